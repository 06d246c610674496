"""`yan generate` and `yan fill`: texts for prompts."""

import sys

from .parsing import add_command, add_model
from .writing import Writer, add_writing_options

MASK = "<mask>"  # what a person writes, whatever the tokenizer's mask token is
GENERATE_EXAMPLES = """  yan generate MODEL "Where is the apple? Mary took the apple." --stream
  yan generate MODEL "Where is the apple? Mary took the apple." --num 3 --seed 1
  cat prompts.txt | yan generate MODEL > answers.txt"""
FILL_EXAMPLES = """  yan fill MODEL "You are lucky in having <mask> a master."
  yan fill MODEL "He loosed <mask>, and forgave <mask> the debt." --steps 8 --stream"""


def add_to(commands):
    """Add the commands of this module."""
    parser = add_command(commands, "generate", generate, "Write the answers to prompts.", GENERATE_EXAMPLES)
    add_model(parser)
    parser.add_argument("text", nargs="*", help="prompts; without any, the lines of stdin")
    add_writing_options(parser)
    parser = add_command(commands, "fill", fill, "Fill in the masks of texts.", FILL_EXAMPLES)
    add_model(parser)
    parser.add_argument("text", nargs="*", help=f"texts with one {MASK} a token; without any, the lines of stdin")
    add_writing_options(parser)


def generate(options):
    """Print the texts for every prompt, one a line."""
    texts = _texts(options)
    _print_answers(Writer(options), texts)


def fill(options):
    """Print every text with its masks filled in."""
    texts = _texts(options)
    writer = Writer(options)
    _print_answers(writer, (_to_prompt(text, writer.tokenizer.mask_token) for text in texts))


def _texts(options):
    """The texts that were given, or the lines of stdin."""
    if not options.text and sys.stdin.isatty():
        raise ValueError("text: must be given, or come as lines on stdin")
    return options.text or (line.rstrip("\n") for line in sys.stdin)


def _to_prompt(text, mask_token):
    from ..data.tasks import FILL_IN

    if MASK not in text:
        raise ValueError(f"text={text!r}: must hold {MASK}")
    return f"{text.replace(MASK, mask_token)} {FILL_IN}"


def _print_answers(writer, prompts):
    for prompt in prompts:
        for answer in writer(prompt):
            print(answer, flush=True)

"""`yan generate` and `yan fill`: texts for prompts."""

import argparse
import sys
from collections.abc import Iterable

from .loading import load_model, load_tokenizer, prepare_library
from .parsing import Commands, add_command, add_device, add_model, whole_number
from .writing import Writer, add_writing_options

MASK = "<mask>"  # what a person writes, whatever the tokenizer's mask token is
GENERATE_EXAMPLES = """  yan generate MODEL "Who has the hat? Anna took the hat." --stream
  yan generate MODEL "Who has the hat? Anna took the hat." --num 3 --seed 1
  cat prompts.txt | yan generate MODEL > answers.txt"""
FILL_EXAMPLES = """  yan fill MODEL "There was nothing to <mask> done."
  yan fill MODEL "And the king <mask> unto him." --steps 8"""


def add_to(commands: Commands) -> None:
    """Add the commands of this module."""
    parser = add_command(commands, "generate", generate, "Write the answers to prompts.", GENERATE_EXAMPLES)
    add_model(parser)
    parser.add_argument("text", nargs="*", help="prompts; without any, the lines of stdin")
    add_writing_options(parser)
    parser = add_command(commands, "fill", fill, "Fill in the masks of texts.", FILL_EXAMPLES)
    add_model(parser)
    parser.add_argument("text", nargs="*", help=f"texts with a {MASK} for each gap; without any, the lines of stdin")
    parser.add_argument("--steps", type=whole_number(0), help="solver steps a canvas; the model's if not given")
    parser.add_argument("--max_gap_tokens", type=whole_number(1), default=4, help="widest gap, in tokens")
    add_device(parser)


def generate(options: argparse.Namespace) -> None:
    """Print the texts for every prompt, one a line."""
    texts = _texts(options)
    _print_answers(Writer(options), texts)


def fill(options: argparse.Namespace) -> None:
    """Print every text with its gaps filled."""
    texts = _texts(options)
    prepare_library(is_quiet=not options.debug)
    model, tokenizer = load_model(options.model, options.device), load_tokenizer(options.model)
    for text in texts:
        text = text.replace(MASK, tokenizer.mask_token or MASK)  # `fill` refuses a tokenizer without one
        print(model.fill(tokenizer, text, options.max_gap_tokens, options.steps).text, flush=True)


def _texts(options: argparse.Namespace) -> Iterable[str]:
    """The texts that were given, or the lines of stdin."""
    if not options.text and sys.stdin.isatty():
        raise ValueError("text: must be given, or come as lines on stdin")
    return map(checked_text, options.text or (line.rstrip("\r\n") for line in sys.stdin))


def checked_text(text: str) -> str:
    """The text. Raises ValueError if it came from bytes that are no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # the interpreter lets such bytes through as surrogates
        raise ValueError(f"text {text!r:.60}: must be in UTF-8") from error
    return text


def _print_answers(writer: Writer, prompts: Iterable[str]) -> None:
    for prompt in prompts:
        for answer in writer(prompt):
            print(answer, flush=True)

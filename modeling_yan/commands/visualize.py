"""`yan visualize`: how a text comes about, as a picture and as one page of HTML."""

import argparse
from pathlib import Path

from .loading import load_model, load_tokenizer, prepare_library
from .parsing import Commands, add_command, add_device, add_model, whole_number

EXAMPLES = """  yan visualize MODEL "Who has the hat? Anna took the hat." --output pictures
  yan visualize MODEL "There was nothing to <mask> done." --steps 8 --output pictures"""
PICTURE, PAGE = "path.png", "path.html"


def add_to(commands: Commands) -> None:
    """Add the command."""
    purpose = "Draw the path of the latents, the experts and the drafts of a text."
    parser = add_command(commands, "visualize", visualize, purpose, EXAMPLES)
    add_model(parser)
    parser.add_argument("text", nargs="*", help="one prompt")
    parser.add_argument("--output", type=Path, required=True, help=f"folder for {PICTURE} and {PAGE}")
    parser.add_argument("--steps", type=whole_number(1), help="solver steps; the model's if not given")
    add_device(parser)


def visualize(options: argparse.Namespace) -> None:
    """Draw the first canvas of the text for a prompt."""
    if len(options.text) != 1:
        raise ValueError(f"text={options.text}: must be one prompt")
    prepare_library(is_quiet=not options.debug)
    from ..visualization import draw, follow, page_of

    model, tokenizer = load_model(options.model, options.device), load_tokenizer(options.model)
    path = follow(model, tokenizer, options.text[0], options.steps)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(path).savefig(options.output / PICTURE, dpi=110)
    page = page_of(path, options.text[0], (options.output / PICTURE).read_bytes())
    (options.output / PAGE).write_text(page, encoding="utf-8")
    print(f"{options.output / PICTURE}\n{options.output / PAGE}")

"""`yan export`: the generation of one canvas as a program that runs without this package."""

import argparse
from pathlib import Path

from .loading import load_model, prepare_library
from .parsing import Commands, Parser, add_command, add_model, whole_number

EXAMPLES = """  yan export MODEL --output yan.pt2
  yan export MODEL --format native --output yan-native.pt2
  yan export MODEL --format onnx --output yan.onnx --batch_size any --prompt_length any"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    purpose = "Write the generation of one canvas, from prompt ids to token ids, as a program that needs no package."
    parser = add_command(commands, "export", export, purpose, EXAMPLES)
    add_model(parser)
    add_export_options(parser)


def add_export_options(parser: Parser) -> None:
    """Add all options but the model."""
    parser.add_argument("--output", type=Path, required=True, help="file that ends in .pt2, or .onnx for onnx")
    parser.add_argument("--format", default="graph", choices=("graph", "native", "onnx"), help="native: AOTInductor")
    parser.add_argument("--batch_size", type=_size, default=1, help="prompts of a call, or any")
    parser.add_argument("--prompt_length", type=_size, default=64, help="tokens, or any; shorter prompts are padded")
    parser.add_argument("--canvas_length", type=int, help="tokens; the model's if not given")
    parser.add_argument("--num_flow_steps", type=int, help="the model's if not given")


def _size(word: str) -> int | None:
    return None if word == "any" else whole_number(1)(word)


def export(options: argparse.Namespace) -> None:
    """Export and save, and print the size of the file."""
    prepare_library(is_quiet=not options.debug)
    from ..export import check_program_path, export_generation, save_program

    check_program_path(options.output, options.format)
    sizes = (options.batch_size, options.prompt_length, options.canvas_length, options.num_flow_steps)
    save_program(export_generation(load_model(options.model, "cpu"), *sizes), options.output, options.format)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")

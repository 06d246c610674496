"""`yan demo`: a page in the browser that generates texts and shows how they come about."""

import argparse
import sys
from pathlib import Path

from .loading import load_config, load_model, load_tokenizer, prepare_library
from .parsing import Commands, add_command, add_device, whole_number

EXAMPLES = """  yan demo
  yan demo MODEL ANOTHER_MODEL --port 7861"""
BUNDLED = Path(__file__).parents[2] / "examples" / "checkpoints"  # in a clone of the repository


def add_to(commands: Commands) -> None:
    """Add the command."""
    purpose = "Open a page on this machine that generates texts and shows how they come about."
    parser = add_command(commands, "demo", demo, purpose, EXAMPLES)
    help_of_models = "folders or hub names of checkpoints; the bundled ones if not given"
    parser.add_argument("models", metavar="MODEL", nargs="*", help=help_of_models)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in")
    parser.add_argument("--port", type=whole_number(1, 65535), default=7860, help="port to listen on")
    add_device(parser)


def demo(options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    names = options.models or bundled_models()
    prepare_library(is_quiet=not options.debug)
    for name in names:  # before anything slow
        load_config(name)
    print(f"yan demo: loads {', '.join(names)}", file=sys.stderr, flush=True)
    try:
        from ..demo.page import build_demo, launch
    except ImportError as error:
        raise ImportError(
            f"{error}: the demo needs gradio and matplotlib, pip install 'modeling-yan[demo]'"
        ) from error

    shown = [Path(name).resolve().name if Path(name).exists() else name for name in names]
    titles = [name if shown.count(title) > 1 else title for name, title in zip(names, shown, strict=True)]
    models = {
        title: (load_model(name, options.device), load_tokenizer(name))
        for title, name in zip(titles, names, strict=True)
    }
    launch(build_demo(models), server_name=options.host, server_port=options.port)


def bundled_models() -> list[str]:
    """The folders of the bundled models.

    Raises:
        ValueError: The package lies outside a clone of its repository.
    """
    folders = sorted(str(path.parent) for path in BUNDLED.glob("*/config.json"))
    if not folders:
        raise ValueError("MODEL: must be given, the bundled models are in examples/checkpoints of the repository")
    return folders[::-1]

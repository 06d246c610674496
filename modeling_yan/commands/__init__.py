"""The command `yan`: one module per group of commands, each thin over the library.

Modules here import torch, transformers and the library inside functions alone, so that `yan --help` answers at once.
"""

import argparse
import os
import select
import sys
import textwrap
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import TextIO, cast

from . import benchmark, chat, completion, demo, evaluate, export, generate, info, serve, training, visualize
from .parsing import Parser

GROUPS = (generate, chat, training, evaluate, benchmark, export, serve, visualize, demo, info, completion)
FAULT, BAD_INPUT, INTERRUPTED, UNREAD = 1, 2, 130, 141  # exit codes
LONGEST_MESSAGE = 500  # characters of an error; all of it with --debug
EPILOG = """
examples:
  yan generate MODEL "Who has the hat? Anna took the hat." --stream
  yan fill MODEL "There was nothing to <mask> done."
  yan train --recipe configuration/recipes/tiny-flow.yaml --tokenizer tokenizer --train_file my.jsonl.gz ...

MODEL is a folder or the name of a model on the hub. `yan COMMAND --help` has the options and examples of a command.
exit codes: 0 all went well, 2 bad input, 130 stopped by Ctrl-C, 141 nobody reads the output, 1 any other fault
"""


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="yan", description="Write, fill in, train, measure and export text with YAN.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"yan {import_module('modeling_yan').__version__}")
    parser.set_defaults(run=lambda options: parser.print_help(), parser=parser, debug=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for group in GROUPS:
        group.add_to(commands)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Do what the words ask for, those of the command line if None, and return the exit code."""
    try:
        code = _run(sys.argv[1:] if words is None else words)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = UNREAD
    return code


def _run(words: Sequence[str]) -> int:
    try:
        options, others = _read(words)
        options.run(options, *others)
    except SystemExit as end:  # help or bad input, which the parser has answered
        return cast(int, end.code or 0)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):
            raise
        return _complain(error, options.parser.prog, options.debug)
    return 0


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose reader is gone."""
    if not hasattr(select, "poll"):  # on Windows
        return True
    watch = select.poll()
    try:
        watch.register(stream.fileno(), 0)  # for errors, which need not be asked for
    except OSError:  # it is no file
        return False
    return any(event & select.POLLERR for _, event in watch.poll(0))


def _read(words: Sequence[str]) -> tuple[argparse.Namespace, list[list[str]]]:
    """The options of a command, and what its `run` gets besides: the words, of one that reads them itself."""
    options, others = build_parser().parse_known_args(words)
    if hasattr(options, "reads_words"):
        return options, [others]
    if hasattr(options, "text") and not any(word.startswith("-") for word in others):
        options.text, others = [*options.text, *others], []  # argparse takes no texts that follow an option
    if others:
        options.parser.error(f"no such argument as {' '.join(others)}")
    return options, []


def _complain(error: Exception, program: str, debug: bool) -> int:
    """Say what went wrong, in one line unless asked for all of it, and return the exit code."""
    is_input = isinstance(error, (ValueError, OSError, ImportError)) and not isinstance(error, BrokenPipeError)
    if debug:
        traceback.print_exc()
    else:
        message = textwrap.shorten(str(error), LONGEST_MESSAGE, placeholder=" ... (all of it with --debug)")
        print(f"{program}: {message if is_input else f'{type(error).__name__}: {message}'}", file=sys.stderr)
    return BAD_INPUT if is_input else FAULT

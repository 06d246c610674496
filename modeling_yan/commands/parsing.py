"""Parsers whose help shows examples and whose errors are one line."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class OneLineErrors(argparse.ArgumentParser):
    """A parser for which bad input gets one line on stderr and the exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class ExampleFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Examples as they were written, and the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, False, argparse.SUPPRESS)
        return super()._get_help_string(action) if has_default else action.help


class Parser(OneLineErrors):
    """A parser of commands or of one command; options can't be abbreviated."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=ExampleFormatter, allow_abbrev=False, **settings)


def add_command(
    commands: Commands, name: str, run: Callable[..., None], purpose: str, examples: str, **settings: Any
) -> Parser:
    """Add a command to those of `yan`; `run` gets its options. Returns its parser, for the arguments."""
    parser = commands.add_parser(name, help=purpose, description=purpose, epilog=f"examples:\n{examples}", **settings)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and all warnings")
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_model(parser: Parser, **settings: Any) -> None:
    """Add MODEL, the first argument of most commands."""
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a checkpoint", **settings)


def add_device(parser: Parser) -> None:
    """Add --device."""
    parser.add_argument("--device", help="such as cpu or cuda:0; if not given, a GPU where there is one")


def whole_number(low: int, high: float = math.inf) -> Callable[[str], int]:
    """Function from a word to a whole number from `low` to `high`, as the `type` of an argument."""

    def parse(word: str) -> int:
        if not word.removeprefix("-").isdecimal() or not low <= int(word) <= high:
            most = "" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{word!r}: must be a whole number of at least {low}{most}")
        return int(word)

    return parse

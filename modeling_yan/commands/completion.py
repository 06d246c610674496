"""`yan completion`: names of commands and options, and files, at the press of Tab."""

import argparse

from .parsing import Commands, add_command

EXAMPLES = """  yan completion bash > ~/.local/share/bash-completion/completions/yan
  source <(yan completion bash)
  autoload -U +X bashcompinit && bashcompinit && source <(yan completion bash)   in zsh"""
SCRIPT = r"""_yan() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words
    case "${{COMP_CWORD}} ${{COMP_WORDS[1]}}" in
        1\ *) words="{names}" ;;
{cases}
    esac
    if [[ $COMP_CWORD -eq 1 || $word == -* ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$word"))
    fi
}}
complete -o default -F _yan yan"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(commands, "completion", complete, "Print a script of completions for a shell.", EXAMPLES)
    parser.add_argument("shell", choices=("bash",), help="the shell")
    parser.set_defaults(commands=commands)


def complete(options: argparse.Namespace) -> None:
    """Print the script. The options of train and finetune are not in it, they would take seconds to find out."""
    parsers = options.commands.choices
    cases = [
        f'        *\\ {name}) words="{" ".join(parser._option_string_actions)}" ;;' for name, parser in parsers.items()
    ]
    print(SCRIPT.format(names=" ".join(["--help", "--version", *parsers]), cases="\n".join(cases)))

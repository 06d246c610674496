"""`yan chat`: a talk, line by line."""

import argparse
import sys

from .generate import checked_text
from .parsing import Commands, add_command, add_model
from .writing import Writer, add_writing_options

LAST_LINES = ("exit", "quit")
EXAMPLES = """  yan chat MODEL
  yan chat MODEL --stream --temperature 0.7"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(commands, "chat", chat, "Answer line by line, until exit or Ctrl-D.", EXAMPLES)
    add_model(parser)
    add_writing_options(parser)


def chat(options: argparse.Namespace) -> None:
    """Answer every line; the chat template decides whether the model sees the lines before it, too."""
    writer, messages = Writer(options), []
    has_template = writer.tokenizer.chat_template is not None
    if not has_template:
        print("The model has no chat template: every line is a prompt of its own.", file=sys.stderr)
    while (line := _read_line()) is not None:
        messages.append({"role": "user", "content": line})
        try:
            checked_text(line)
            answers = writer(_prompt(writer, messages), False) if has_template else writer(line)
        except ValueError as error:  # such as a line that is too long
            print(f"yan chat: {error}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answers[0]})
        print(*answers, sep="\n", flush=True)


def _read_line() -> str | None:
    """The next line that is not empty, or None at the end."""
    try:
        while not (line := input("> " if sys.stdin.isatty() else "").strip()):
            pass
    except EOFError:
        return None
    return None if line in LAST_LINES else line


def _prompt(writer: Writer, messages: list[dict[str, str]]) -> str:
    """The messages by the template, without the oldest exchanges where all of them would be too long."""
    for start in range(0, len(messages), 2):
        prompt = writer.tokenizer.apply_chat_template(messages[start:], tokenize=False, add_generation_prompt=True)
        if (
            len(writer.tokenizer(prompt, add_special_tokens=False)["input_ids"])
            <= writer.model.config.max_prompt_length
        ):
            break
    return str(prompt)

"""The examples of the help can be typed as they are, and a bundled model answers those with a text."""

import re
import shlex

import pytest

import modeling_yan.commands as commands
from modeling_yan.commands import main

MODEL = "examples/checkpoints/yan-transformer-tiny"


def examples():
    """Every `yan ...` of a help, in words."""
    parser = commands.build_parser()
    (chosen,) = (action.choices for action in parser._actions if hasattr(action.choices, "items"))
    for text in (each.epilog for each in (parser, *chosen.values())):
        for line in re.sub(r" *\\\n *", " ", text or "").splitlines():
            if found := re.match(r" +(?:\w+=\S+ |.*\| )?(yan [a-z].*)", line):
                yield shlex.split(re.sub(r" (>|\.\.\.).*", "", found[1]))[1:]


def test_there_are_many():
    assert len(list(examples())) > 25


@pytest.mark.parametrize("words", list(examples()), ids=" ".join)
def test_an_example_can_be_read(words, monkeypatch):
    for group in commands.GROUPS:  # `completion` and others that do at once what they do
        monkeypatch.setattr(group, "prepare_library", lambda **_: None, raising=False)
    options, _ = commands._read(words)
    assert callable(options.run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["generate", MODEL, "Who has the hat? Anna took the hat."], "Anna has the hat."),
        (["fill", MODEL, "There was nothing to <mask> done."], "There was nothing to be done."),
    ],
)
def test_a_bundled_model_answers_them(words, answer, capsys):
    shown = {example[2] for example in examples() if example[0] == words[0] and len(example) > 2}
    assert words[2] in shown
    assert main(words) == 0
    assert capsys.readouterr().out.strip() == answer

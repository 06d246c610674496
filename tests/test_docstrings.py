"""The docstrings of the core: short sentences, and an example of every public class that does what it says."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

import modeling_yan
from modeling_yan.generation_yan import YanGenerationMixin
from modeling_yan.objective_config_yan import YanObjectiveConfig

ROOT = Path(modeling_yan.__file__).parent
FILES = sorted(ROOT.glob("*_yan.py"))
WITH_EXAMPLES = sorted(path for path in ROOT.rglob("*.py") if ">>> " in path.read_text())
MOST_WORDS = 24
# A term and its colon, as under "Args"; what follows is a sentence of its own. Code in backticks is one word.
TERM = re.compile(r"^\s*[\w, *]+: ", re.MULTILINE)
CODE = re.compile(r"`[^`]*`|\([^()]*\)")
PUBLIC = [getattr(modeling_yan, name) for name in modeling_yan.__all__]


def docstrings(path):
    """Name and docstring of everything in a file that has one, examples left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", path.stem), text.split("Example:")[0]


def sentences(text):
    paragraphs = [each for each in text.split("\n\n") if not each.startswith("Letters")]  # a legend is no sentence
    return [
        each for part in paragraphs for each in re.split(r"(?<=[.:;?!])\s+", CODE.sub("code", TERM.sub(". ", part)))
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_sentences_are_short(path):
    found = [(name, each) for name, text in docstrings(path) for each in sentences(text)]
    assert [(name, each) for name, each in found if len(each.split()) > MOST_WORDS] == []


@pytest.mark.parametrize(
    "documented", [*PUBLIC, YanObjectiveConfig, YanGenerationMixin.generate], ids=lambda each: each.__name__
)
def test_every_public_class_and_generate_have_an_example(documented):
    assert "    >>> " in documented.__doc__


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_examples_do_what_they_say(path, monkeypatch):
    monkeypatch.chdir(ROOT.parent)  # they load a bundled checkpoint
    name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0

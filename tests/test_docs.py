"""The pages of the documentation: their Python runs, their commands exist, their links lead somewhere.

A ```python block runs unless the line before it is a comment that begins with `<!-- not run:`. A ```text block behind
one holds what it prints.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OLDER = ("results", "performance", "checkpoints", "differences", "log", "reliability")  # records: hours of runs
PAGES = [path for path in sorted(DOCS.glob("*.md")) + sorted(DOCS.glob("guides/*.md")) if path.stem not in OLDER]
README = ROOT / "README.md"
LINKED = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^(?P<note><!-- not run:.*?-->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)
MOST_LINES, MOST_WORDS = 150, 24


class Block(NamedTuple):
    """A fenced block of a page, and the number of its first line."""

    language: str
    code: str
    line: int
    runs: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match["language"], match["code"], text[: match.start("code")].count("\n"), match["note"] is None)
        for match in FENCE.finditer(text)
    ]


def python_blocks(page: Path) -> list[tuple[Block, str | None]]:
    """The blocks that run, each with what it has to print, if that stands behind it."""
    end = Block("", "", 0, False)
    return [
        (block, after.code if after.language == "text" else None)
        for block, after in pairwise([*blocks(page), end])
        if block.language == "python" and block.runs
    ]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder that looks like the repository's to a reader's code, and takes what it writes."""
    for name in ("examples", "configuration"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_page(page: Path):
    """Run the blocks of a page one after the other, and hold what they print against the page."""
    names = {"__name__": "__main__"}
    for block, expected in python_blocks(page):
        code = compile("\n" * block.line + block.code, str(page), "exec")  # errors name the page's own line
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        if expected is not None:
            assert printed.getvalue() == expected, f"{page.name}, line {block.line}"


@pytest.mark.parametrize(
    "page", [page for page in [*PAGES, README] if python_blocks(page)], ids=lambda page: page.stem
)
def test_the_python_of_a_page_runs_and_prints_what_stands_there(page, workplace):
    run_page(page)


def test_a_page_that_is_wrong_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n```python\nprint(1 + 1)\n```\n```text\n3\n```\n")
    with pytest.raises(AssertionError):
        run_page(page)


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the ```bash blocks of a page."""
    lines = "".join(block.code for block in blocks(page) if block.language == "bash").replace("\\\n", " ")
    return [line.split() for line in lines.splitlines()]


def scripts(words: list[str]) -> list[str]:
    """The scripts and modules of this repository that a command runs."""
    modules = [after for word, after in pairwise(words) if word == "-m" and after.startswith("modeling_yan")]
    return [word for word in words if word.startswith("examples/") and word.endswith(".py")] + modules


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_the_files_of_a_command_exist(page):
    named = [word for words in commands(page) for word in words if word.startswith(("examples/", "configuration/"))]
    modules = [name for words in commands(page) for name in scripts(words) if not name.endswith(".py")]
    named += [name.replace(".", "/") + ".py" for name in modules]
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []


def test_the_figures_of_the_finetuning_guide_are_those_of_their_files():
    text = (DOCS / "guides" / "finetune.md").read_text(encoding="utf-8")
    seconds = json.loads((DOCS / "benchmarks" / "encoder-states.json").read_text())["seconds"]
    ratios = {length: f"{each['computed'] / each['read']:.1f}" for length, each in seconds.items()}
    assert f"{ratios['32']} times as fast with sources of 32 tokens, and {ratios['128']} times with 128" in text
    run = json.loads((DOCS / "benchmarks" / "finetuning.json").read_text())
    assert dict(pairwise(run["words"]))["--num_train_epochs"] == "3"
    minutes, right = f"{run['seconds']['processor'] / 60:.0f}", f"{run['test']['exact_match']:.3f}"
    assert f"{minutes} minutes of one core's time, and {right} of {run['test']['rows']} test rows" in text


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_a_command_does_not_train_into_a_folder_with_a_saved_model(page):
    text = page.read_text(encoding="utf-8")
    saved = set(re.findall(r'save_pretrained\("([^"]+)"\)', text))
    trained = re.findall(r"--output_dir (\S+)", text)
    assert not saved & set(trained)  # `finetune` refuses a folder with a finished model


SCRIPTS = sorted({script for page in PAGES for words in commands(page) for script in scripts(words)})


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_options_of_a_command_exist(script):
    start = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    command = [sys.executable, *start, "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout
    for page in PAGES:
        for words in commands(page):
            if script in words:
                given = {word for word in words[words.index(script) :] if word.startswith("--")}
                assert {option for option in given if option not in shown} == set(), page.name


def test_every_name_of_the_api_page_exists():
    names = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    assert len(names) > 30
    assert [name for name in names if not exists(name)] == []


def exists(name: str) -> bool:
    """Whether a dotted name is that of something in a module, or of something in a class of one."""
    parts = name.split(".")
    place = next(at for at in range(len(parts), 0, -1) if find_spec_or_none(".".join(parts[:at])))
    thing = import_module(".".join(parts[:place]))
    for part in parts[place:]:
        thing = getattr(thing, part, None)
    return thing is not None


def find_spec_or_none(name):
    try:
        return find_spec(name)
    except ModuleNotFoundError:
        return None


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site makes them."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in HEADING.findall(prose)]
    return {re.sub(r"[-\s]+", "-", title) for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_links_of_a_page_lead_somewhere(page):
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for link in LINK.findall(prose):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        folder = DOCS if page.is_relative_to(DOCS / "results") else page.parent  # parts of docs/results.md
        target = (folder / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def sentences(page: Path) -> list[str]:
    """The sentences of a page's prose, without code, tables and pictures."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "#", "!", ":::", "<!--", "    "))]
    prose = LINK.sub("link", "\n".join(lines))
    return re.split(r"[.!?:;](?:\s|\*|$)|\n\s*\n|\n[-\d]", prose)


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_a_page_is_short_and_so_are_its_sentences(page):
    assert page.read_text(encoding="utf-8").count("\n") <= MOST_LINES
    long = [sentence for sentence in sentences(page) if len(sentence.split()) > MOST_WORDS]
    assert long == []


@pytest.mark.parametrize(
    "page",
    [*DOCS.glob("*.md"), *DOCS.glob("guides/*.md"), *DOCS.glob("archive/*.md"), README],
    ids=lambda page: page.stem,
)
def test_a_page_begins_with_what_the_reader_will_have(page):
    begins = r"# .+\n\nAfter this (page|guide) " if page != README else "# YAN\n\nYAN writes a whole text at once"
    assert re.match(begins, page.read_text(encoding="utf-8"))

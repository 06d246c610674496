"""Rows of text on disk: one JSON object a line, plain (`.jsonl`) or compressed (`.jsonl.gz`).

A row is either a text, `{"text": ...}`, or a pair, `{"source": ..., "target": ...}`. Further keys are kept as they
are, so a text row may well have a `source` that names the book it comes from.
"""

import contextlib
import gzip
import json
import os
import shutil
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ALLOWED_JSON = "rows are one JSON object a line, or one array of objects"
ALLOWED = 'a row is a JSON object with a non-empty string "text", or with strings "source" and non-empty "target"'
SUFFIXES = (".jsonl", ".jsonl.gz")
UNFINISHED = ".unfinished-"  # begins the name of what is not there as a whole yet

Row = dict[str, Any]


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Read and check every row of a `.jsonl` or `.jsonl.gz` file; blank lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the name ends otherwise, a row is malformed (the message names file, line and what is allowed),
            the file is cut off or damaged, or it holds no row at all.

    Example:

        >>> import os, tempfile
        >>> from modeling_yan.data import read_rows, write_rows
        >>> path = os.path.join(tempfile.mkdtemp(), "rows.jsonl.gz")
        >>> write_rows(path, [{"source": "Who has the hat? Anna took the hat.", "target": "Anna"}])
        >>> read_rows(path)[0]["target"]
        'Anna'
    """
    path = _checked_path(path)
    rows = [_parse(line, f"{path}, line {number}") for number, line in numbered_lines(path) if line.strip()]
    if not rows:
        raise ValueError(f"{path}: the file holds no rows; {ALLOWED}")
    return rows


def write_rows(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write checked rows so that the file appears whole or not at all; equal rows give equal bytes.

    Raises:
        ValueError: the name ends otherwise, a row is malformed, or there are none.
    """
    path = _checked_path(path)
    lines = [_dump(row, f"{path}, line {number}") for number, row in enumerate(rows, start=1)]
    if not lines:
        raise ValueError(f"{path}: there are no rows to write")
    write_whole(path, _packed("".join(lines).encode("utf-8"), path))


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path`, to write a file or a folder to: it takes the place of `path` if the block succeeds.

    So others see `path` whole or not at all. What a killed process leaves begins with `UNFINISHED`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        remove(aside)


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file so that it appears whole or not at all; a text in UTF-8."""
    with replacing(path) as aside:
        aside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def row_texts(row: Row) -> list[str]:
    """All the prose of a row: `[source, target]` of a pair, `[text]` of a text."""
    return [row["source"], row["target"]] if "target" in row else [row["text"]]


def check_row(row: Any, where: str) -> None:
    """Raise a ValueError that begins with `where` unless `row` is a text or a pair."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found {type(row).__name__}, not an object; {ALLOWED}")
    if "text" not in row and not {"source", "target"} <= row.keys():
        raise ValueError(f"{where}: has only the keys {sorted(row)}; {ALLOWED}")
    for key in ("source", "target") if "target" in row else ("text",):
        _check_string(row.get(key), key, where)


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, unpacked if its name ends in `.gz`, with their numbers from 1.

    The byte-order mark that some programs put before UTF-8 is left out.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line.removeprefix(BOM_UTF8) if number == 1 else line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, after line {number}: the gzip file is cut off or damaged ({error})") from error


def parse_json(content: bytes, where: str) -> Any:
    """What the JSON says, or a ValueError that begins with `where`."""
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # broken UTF-8, broken JSON, or brackets within brackets without end
        raise ValueError(f"{where}: not JSON in UTF-8 ({error}); {ALLOWED_JSON}") from error


def _check_string(value: Any, key: str, where: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{key}" is {type(value).__name__}, not a string; {ALLOWED}')
    if key != "source" and not value.strip():
        raise ValueError(f'{where}: "{key}" is empty; {ALLOWED}')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer can read
        raise ValueError(f'{where}: "{key}" is not valid Unicode ({error.reason})') from error


def _checked_path(path: str | os.PathLike[str]) -> Path:
    if not str(path).endswith(SUFFIXES):
        raise ValueError(f"{path}: the name of a file of rows ends in {' or '.join(SUFFIXES)}")
    return Path(path)


def _parse(line: bytes, where: str) -> Row:
    row = parse_json(line, where)
    check_row(row, where)
    return row


def _dump(row: Row, where: str) -> str:
    check_row(row, where)
    return json.dumps(row, ensure_ascii=False) + "\n"


def _packed(content: bytes, path: Path) -> bytes:
    # Without a fixed time in the header, equal rows would give different files.
    return gzip.compress(content, mtime=0) if path.suffix == ".gz" else content

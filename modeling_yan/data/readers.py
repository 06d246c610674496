"""Raw rows of local files, one after the other, each with where it comes from.

| name ends in | rows |
|---|---|
| `.jsonl` | one JSON object a line |
| `.json` | the same, or one array of objects |
| `.txt` | every line, or every paragraph (between blank lines), as `text` |
| `.parquet` | the table's rows |

Blank lines are skipped. All but `.parquet` may be gzipped (`.jsonl.gz`).
"""

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from .rows import Row, numbered_lines, parse_json

SAMPLE_BY = ("line", "paragraph")
PARQUET_BATCH = 100  # rows decoded at a time

PlacedRow = tuple[str, Any]  # where it comes from, for messages, and the row


def find_files(patterns: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files of these names, in this order; a pattern such as `shards/*.jsonl.gz` gives its matches, sorted.

    Raises:
        FileNotFoundError: a name or a pattern matches no file.
        ValueError: a file has an unknown ending.
    """
    return [_checked(path) for pattern in patterns for path in _matches(str(pattern))]


def is_file_name(name: str) -> bool:
    """Whether `name` is meant as a file or as a pattern of files, by its ending or its wildcards."""
    return _suffix(Path(name)) in READERS or glob.has_magic(name) or os.path.isfile(name)


def read_file(path: Path, sample_by: str = "line") -> Iterator[PlacedRow]:
    """Read the rows of one file as they are asked for; what is in a row is not checked.

    Raises:
        ValueError: the file is cut off, damaged, not JSON or not UTF-8, or holds no rows.
    """
    rows = READERS[_suffix(path)](path, sample_by)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path}: the file holds no rows")
    yield first
    yield from rows


def _matches(pattern: str) -> list[str]:
    is_pattern = glob.has_magic(pattern) and not os.path.isfile(pattern)  # a file's own name may hold brackets
    matches = sorted(glob.glob(pattern, recursive=True)) if is_pattern else [pattern]
    if not matches or not all(os.path.isfile(match) for match in matches):
        raise FileNotFoundError(f"{pattern}: no such file")
    return matches


def _checked(name: str) -> Path:
    if _suffix(Path(name)) not in READERS:
        endings = ", ".join(READERS)
        raise ValueError(f"{name}: the name of a file of rows ends in {endings} or, but for .parquet, that and .gz")
    return Path(name)


def _suffix(path: Path) -> str:
    packed = path.name.endswith(".gz") and not path.name.endswith(".parquet.gz")
    return (Path(path.name.removesuffix(".gz")).suffix if packed else path.suffix).lower()


def _read_json_lines(path: Path, sample_by: str) -> Iterator[PlacedRow]:
    return _parse_lines(path, _filled_lines(path))


def _read_json(path: Path, sample_by: str) -> Iterator[PlacedRow]:
    lines = _filled_lines(path)
    for number, line in lines:  # the first one tells the form; either way it takes all the others
        if line.lstrip().startswith(b"["):
            rows = parse_json(line + b"".join(line for _, line in lines), str(path))
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
        else:
            yield from _parse_lines(path, chain([(number, line)], lines))


def _parse_lines(path: Path, lines: Iterable[tuple[int, bytes]]) -> Iterator[PlacedRow]:
    for number, line in lines:
        where = f"{path}, line {number}"
        yield where, parse_json(line, where)


def _filled_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in numbered_lines(path) if line.strip())


def _read_text(path: Path, sample_by: str) -> Iterator[PlacedRow]:
    lines = ((number, line) for number, group in numbered_lines(path) for line in _split_lines(group))
    if sample_by == "line":
        paragraphs: Iterable[Any] = ([numbered] for numbered in lines if numbered[1].strip())
    else:
        runs = groupby(lines, key=lambda numbered: bool(numbered[1].strip()))
        paragraphs = (list(lines) for filled, lines in runs if filled)
    for paragraph in paragraphs:
        where = f"{path}, line {paragraph[0][0]}"
        yield where, {"text": _decode(b"".join(line for _, line in paragraph), where).strip()}


def _split_lines(line: bytes) -> list[bytes]:
    """The lines inside of one, which CR or CRLF may end, each with a plain newline."""
    return line.replace(b"\r\n", b"\n").replace(b"\r", b"\n").splitlines(keepends=True)


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error})") from error


def _read_parquet(path: Path, sample_by: str) -> Iterator[PlacedRow]:
    for number, row in enumerate(_parquet_rows(path), start=1):
        yield f"{path}, row {number}", row


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow  # takes a moment, and only these files need it
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: the parquet file is cut off or damaged ({error})") from error


READERS: dict[str, Callable[[Path, str], Iterator[PlacedRow]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}

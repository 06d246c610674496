"""Pairs of source and target out of any columns, of a file or of a data set that `datasets` loads.

| a file's name ends in | rows |
|---|---|
| `.jsonl`, `.json` | one JSON object a line, or one array of objects |
| `.csv`, `.tsv` | a table whose first line names the columns; every field is text, and may stand in quotes |
| `.parquet` | the table's rows |

All but `.parquet` may be gzipped. `datasets` reads tables; of JSON it would take texts that look like dates for dates.
"""

import csv
import glob
import logging
import math
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal, cast

from .readers import read_file
from .rows import Row, check_row, numbered_lines

if TYPE_CHECKING:  # it takes a moment to load
    from datasets import Dataset

logger = logging.getLogger(__name__)

JSON, TABLES = (".jsonl", ".json"), {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SEPARATORS = ",;\t"  # of a .csv: the one that its first line has most of


@dataclass(frozen=True)
class PairColumns:
    """Which columns become the pairs.

    Args:
        source, target: Names of the columns of sources and of targets.
        template: Makes a source out of several columns, instead of `source`. It has the form of `str.format`:
            "context: {context} question: {question}".

    Raises:
        ValueError: A template without columns, or sources that hold the target.

    Example:

        >>> from modeling_yan.data.tables import PairColumns
        >>> PairColumns(target="answer", template="context: {context} question: {question}").needed
        ['context', 'question', 'answer']
    """

    source: str = "source"
    target: str = "target"
    template: str | None = None

    def __post_init__(self) -> None:
        if self.template is None:
            self._check_target()
            return
        allowed = "must be text with columns in braces, such as 'context: {context} question: {question}'"
        try:
            names = self.needed[:-1]
        except ValueError as error:
            raise ValueError(f"template={self.template!r}: {allowed} ({error})") from None
        if not names or not all(name and not name.isdecimal() for name in names):
            raise ValueError(f"template={self.template!r}: {allowed}")
        self._check_target()

    def _check_target(self) -> None:
        if self.target in self.needed[:-1]:
            raise ValueError(f"target_column={self.target!r}: must be no part of the source, {self.form!r}")

    @property
    def form(self) -> str:
        """The form of a source, with its columns in braces."""
        return f"{{{self.source}}}" if self.template is None else self.template

    @property
    def needed(self) -> list[str]:
        """The columns that a table must have, that of the targets last."""
        if self.template is None:
            return [self.source, self.target]
        fields = [name for _, name, _, _ in Formatter().parse(self.template) if name is not None]
        return [*dict.fromkeys(re.split(r"[.\[]", name)[0] for name in fields), self.target]


def load_file(path: str | os.PathLike[str]) -> "Dataset | list[Row]":
    """The rows of a file, in its own columns.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The name ends otherwise, the file is damaged, or it holds no rows; the message names the file.

    Example:

        >>> import os, tempfile
        >>> from modeling_yan.data.tables import load_file
        >>> path = os.path.join(tempfile.mkdtemp(), "rows.jsonl")
        >>> with open(path, "w") as file:
        ...     _ = file.write('{"question": "Who?", "answer": 7}')
        >>> load_file(path)
        [{'question': 'Who?', 'answer': 7}]
    """
    import datasets

    from .sources import root_cause

    path = Path(path)
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in (*JSON, *TABLES) or path.name.endswith(".parquet.gz"):
        endings = ", ".join((*JSON, *TABLES))
        raise ValueError(f"{path}: the name of a file must end in {endings} or, but for .parquet, that and .gz")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if suffix in JSON:
        return [_checked_row(row, where) for where, row in read_file(path)]
    settings = _csv_settings(path, suffix) if TABLES[suffix] == "csv" else {}
    try:
        name = glob.escape(str(path))  # brackets in it would be a pattern
        return datasets.load_dataset(TABLES[suffix], data_files=name, split="train", **settings)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        cause = root_cause(error)
        is_empty = any(message in str(cause) for message in ("corresponds to no data", "BatchSize must be greater"))
        raise ValueError(f"{path}: {'the file holds no rows' if is_empty else cause}") from error


def load_split(name: str, config_name: str | None = None, split: str = "train") -> "Dataset":
    """One split of a folder or of a data set on the hub; "train[:10%]" is a split, too.

    Of .csv files every field is text as it stands there, unless the data set itself says what its columns are.

    Raises:
        FileNotFoundError: There is no such data set.
        ValueError: It has no such split or config, is damaged, or holds no rows.
    """
    from datasets import Features, Value, load_dataset, load_dataset_builder
    from datasets.packaged_modules.csv.csv import Csv

    from .sources import loading_by_name

    if Path(name).is_file():
        raise ValueError(f"--dataset {name!r}: must be a folder or a name on the hub; give a file as --train_file")
    with loading_by_name(name):
        builder, settings = load_dataset_builder(name, config_name), {}
        if isinstance(builder, Csv) and builder.info.features is None:
            first = next(iter(load_dataset(name, config_name, streaming=True).values()))
            columns = first.column_names or list(next(iter(first), {}))
            settings = {"features": Features(dict.fromkeys(columns, Value("string"))), "keep_default_na": False}
        table = load_dataset(name, config_name, split=split, **settings)
    if not len(table):
        raise ValueError(f"{name}: the data set holds no rows")
    return table


def has_split(name: str, config_name: str | None, split: str) -> bool:
    """Whether a data set has a split of this name."""
    from datasets import get_dataset_split_names

    return split in get_dataset_split_names(name, config_name)


def make_pairs(table: "Dataset | list[Row]", columns: PairColumns, name: str) -> list[Row]:
    """The pairs of a table; labels that have names become their names, and numbers text.

    Rows with an empty target, or without a label, are left out, and a warning says how many.

    Args:
        table: A data set of `datasets`, or rows as of `load_file`.
        columns: Names of the columns that make source and target.
        name: Name of the table, for error messages.

    Raises:
        ValueError: A column is missing (the message names those there are) or holds no text; no rows are left.

    Example:

        >>> from modeling_yan.data.tables import PairColumns, hold_out, make_pairs
        >>> rows = [{"question": f"{n} + 1?", "answer": n + 1} for n in range(10)]
        >>> pairs = make_pairs(rows, PairColumns("question", "answer"), "sums")
        >>> pairs[0]
        {'source': '0 + 1?', 'target': '1'}
        >>> [len(part) for part in hold_out(pairs, 0.2, seed=0)]
        [8, 2]
    """
    there = getattr(table, "column_names", None) or list(dict.fromkeys(column for row in table for column in row))
    for column in columns.needed:
        if column not in there:
            allowed = ", ".join(map(repr, there))
            raise ValueError(f"{name}: {_field_of(column, columns)}: must name one of its columns, {allowed}")
    if not isinstance(table, list):
        table = table.select_columns(columns.needed)
    names = {column: getattr(feature, "names", None) for column, feature in getattr(table, "features", {}).items()}
    pairs, number, incomplete = [], 0, []
    for number, raw in enumerate(table, start=1):
        row = {column: _value_of(raw.get(column), names.get(column)) for column in columns.needed}
        pair = _make_pair(row, columns, f"{name}, row {number}")
        if pair["target"].strip():
            check_row(pair, f"{name}, row {number}")
            pairs.append(pair)
            if any(row[column] == "" for column in columns.needed[:-1]):
                incomplete.append(number)
    if incomplete:
        found = f"{len(incomplete)} of {len(pairs)} rows have nothing in a column of {columns.form!r}"
        logger.warning("%s: %s, such as row %d; the model is trained on them", name, found, incomplete[0])
    if len(pairs) < number:
        logger.warning("%s: left out %d of %d rows, whose target is empty", name, number - len(pairs), number)
    if not pairs:
        raise ValueError(f"{name}: {_field_of(columns.target, columns)}: must not be empty in all {number} rows")
    return pairs


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and held-out rows. All rows with the same source are in one of the two.

    Args:
        rows: Rows of `source` and `target`.
        share: About this share of the sources is held out; in (0, 1).
        seed: Seed of the choice.

    Raises:
        ValueError: The share is not between 0 and 1, or all rows have one source.
    """
    if not 0 < share < 1:
        raise ValueError(f"validation_share={share}: must be between 0 and 1")
    sources = list(dict.fromkeys(row["source"] for row in rows))
    if len(sources) < 2:
        hint = "there is 1; give held-out rows of their own"
        raise ValueError(f"validation_share={share}: must be left for rows of two sources or more, and {hint}")
    random.Random(seed).shuffle(sources)
    number = min(max(1, round(share * len(sources))), len(sources) - 1)
    held = set(sources[:number])
    return [row for row in rows if row["source"] not in held], [row for row in rows if row["source"] in held]


def _csv_settings(path: Path, suffix: str) -> dict[str, Any]:
    """Options for `datasets`, by which a field is text as it stands there: "007" no number, "NA" not missing."""
    from datasets import Features, Value

    try:
        first = next((line.decode("utf-8") for _, line in numbered_lines(path)), "").rstrip("\r\n")
        separator = "\t" if suffix == ".tsv" else max(SEPARATORS, key=first.count)
        header, quoting = _read_header(path, separator)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be in UTF-8 ({error})") from error
    if not any(header):
        raise ValueError(f"{path}: the first line must name the columns, and it is empty")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise ValueError(f"{path}: the first line must name every column once, and has {twice[0]!r} twice")
    names = [name or f"Unnamed: {index}" for index, name in enumerate(header)]  # as pandas calls them
    features = Features(dict.fromkeys(names, Value("string")))
    settings = {"sep": separator, "features": features, "keep_default_na": False, "index_col": False}
    return {**settings, "quoting": quoting}


def _read_header(path: Path, separator: str) -> tuple[list[str], int]:
    """The names in the first line of a table, and whether its fields may stand in quotes, as `csv` calls it.

    A quote is one of the text's own in a table between tabs of which it would be a fault, as in `"Who?" he said`, or
    where it would join lines that are whole rows.

    Raises:
        ValueError: A line has more fields than the first one, or quotes in the middle of a field; the message has its
            number.
    """
    try:
        header, num_rows, _ = _checked_header(path, separator, csv.QUOTE_MINIMAL)
    except ValueError:
        if separator != "\t":
            raise
        return _checked_header(path, separator, csv.QUOTE_NONE)[0], csv.QUOTE_NONE
    if separator == "\t":
        plain, num_lines, is_whole = _checked_header(path, separator, csv.QUOTE_NONE)
        if is_whole and num_lines != num_rows:
            return plain, csv.QUOTE_NONE
    return header, csv.QUOTE_MINIMAL


def _checked_header(path: Path, separator: str, quoting: Literal[0, 3]) -> tuple[list[str], int, bool]:
    """The names in the first line, the number of rows, and whether all have so many fields; none may have more."""
    lines = (line.decode("utf-8") for _, line in numbered_lines(path))
    reader = csv.reader(lines, delimiter=separator, quoting=quoting, strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # it is everyone's, and too low for long texts
    num_rows, is_whole = 0, True
    try:
        header = next(reader, [])
        for row in filter(None, reader):
            num_rows, is_whole = num_rows + 1, is_whole and len(row) == len(header)
            if len(row) > len(header):
                hint = f"put a field that holds {separator!r} in quotes"
                raise ValueError(f"{path}, line {reader.line_num}: {len(row)} fields for {len(header)} names; {hint}")
    except csv.Error as error:
        hint = "a field with a quote or a line break stands in quotes, and a quote in it is doubled"
        raise ValueError(f"{path}, line {reader.line_num}: {error}; {hint}") from error
    finally:
        csv.field_size_limit(limit)
    return header, num_rows, is_whole


def _field_of(column: str, columns: PairColumns) -> str:
    """The setting that names a column."""
    if column == columns.target:
        return f"target_column={column!r}"
    return f"source_column={column!r}" if columns.template is None else f"{{{column}}} of the template"


def _checked_row(row: Any, where: str) -> Row:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: found {type(row).__name__}, and a row must be an object")
    return cast(Row, row)


def _value_of(value: Any, names: Sequence[str] | None) -> Any:
    """What stands in a row: "" where there is nothing, and of a label its name."""
    is_missing = value is None or (isinstance(value, float) and math.isnan(value))
    if is_missing or (names and value == -1):  # a label that was not published
        return ""
    return names[value] if names else value


class _RowFormatter(Formatter):
    """`str.format` of what may stand in a source: text, numbers, and "" where there is nothing."""

    def format_field(self, value: Any, format_spec: str) -> str:
        value = _value_of(value, None)
        if not isinstance(value, str | int | float):
            raise TypeError(f"found {type(value).__name__}, must be text or a number")
        return cast(str, super().format_field(value, format_spec))


def _make_pair(row: Row, columns: PairColumns, where: str) -> Row:
    target = _text_of(row[columns.target], columns.target, where)
    if columns.template is None:
        return {"source": _text_of(row[columns.source], columns.source, where), "target": target}
    try:
        return {"source": _RowFormatter().vformat(columns.template, (), row), "target": target}
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: template={columns.template!r}: does not fit the row ({error!r})") from error


def _text_of(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str | int | float):
        raise ValueError(f"{where}: the column {column!r} is {type(value).__name__}: must be text or a number")
    return str(value)

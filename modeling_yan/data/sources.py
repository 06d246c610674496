"""Rows to train on, from the hub, from local files or from the registry, held in Arrow on disk or streamed.

    python -m modeling_yan.data.sources
    python -m modeling_yan.data.sources --name squad --split validation --num_rows 1000 --output squad.jsonl.gz

The first lists the registry, the second writes pairs of one of its data sets.
"""

import argparse
import logging
import os
import random
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import datasets
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from huggingface_hub.errors import HFValidationError

from .readers import SAMPLE_BY, find_files, is_file_name, read_file
from .registry import LEARNED_WHERE, REGISTRY, TEXT, DatasetSpec, FormatOptions, SkippedRow, format_pair, format_text
from .rows import Row, check_row, write_rows
from .stories import generate_story

logger = logging.getLogger(__name__)

EMPTY = (None, False, "")  # what says no more of where a pair is learned than a field that is missing
LISTS = ("masked", "answers")  # the columns that hold lists of strings
STREAM_BATCH = 16  # rows of a hub data set that are formatted at a time when streaming
STORY_SPLITS = {"train": range(2, 20), "validation": range(1), "test": range(1, 2)}

PathLike = str | os.PathLike[str]


def load_rows(
    source: PathLike | Sequence[PathLike],
    *,
    path: PathLike | Sequence[PathLike] | None = None,
    config_name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    num_rows: int | None = None,
    seed: int = 0,
    mask_token: str = "<mask>",
    answer_slot: str = "",
    max_words: int | None = None,
    sample_by: str = "line",
    streaming: bool = False,
    cache_dir: PathLike | None = None,
    **details: Any,
) -> Dataset | IterableDataset:
    """Load rows that are all texts (`text`) or all pairs (`source` and `target`), strings throughout.

    Pairs of the registry have `task` too, those of infilling `masked`, squad's `answers` (lists of strings), babi's
    and the stories' `kind`, and all that have one their `answer_slot`. Pairs of other files and data sets keep
    `answer_slot` and `in_place`, if the first row of a file has them. Other columns are dropped.

    Rows that give nothing are left out: an empty text or target, no answer, no label, a text too short for its task.
    A warning says how many and why, at the end or, when streaming, at the 1st, 10th, 100th of them and so on. It comes
    when rows are made, not when they are found in the cache.

    What is drawn at random for row i depends on `seed` and i alone, so streaming gives the same rows. i is the file's
    number and the row's number in it, or the row's number in a hub data set; of a streamed one with several data
    loader workers, each counts its own rows.

    Args:
        source: A name of `REGISTRY`; local files (`.jsonl`, `.json`, `.txt`, `.parquet`; all but the last may be
            gzipped), one, several or a pattern; a folder laid out like a data set of the hub; or a name on the hub.
        path: For a name of the registry: files, folder or hub name with the same columns, instead of its own.
        config_name, split, revision: Of a data set on the hub, or a folder; `split` is "train" unless given.
        columns: Where other data sets than the registry's have their texts or pairs: {"text": column} or {"source":
            column, "target": column}, where "a.b" is the field b in column a. None for columns of these names.
        task: For data sets of texts: "text", "infilling", "last_word" or "continuation". None for the registry's
            choice, "text" for all others.
        num_rows: At most this many rows, at least 1; exactly this many of the registry's stories, which never end.
        mask_token, answer_slot, max_words, details: As in `FormatOptions`.
        sample_by: A "line" or a "paragraph" of a `.txt` is a row.
        streaming: Return an IterableDataset, which reads and formats rows as they are asked for, one shard a file.
        cache_dir: For downloads and Arrow files; None for the default of `datasets`. Changed files are read again.

    Raises:
        FileNotFoundError: No such file or data set.
        ValueError: Options that don't fit the source, or a bad one; a missing column; a row that is not of the right
            form, an unreadable file (the message names file and row), or no rows at all.
    """
    options = FormatOptions(task, mask_token, answer_slot, max_words, details)
    if sample_by not in SAMPLE_BY:
        raise ValueError(f"sample_by is {sample_by!r}, but must be {' or '.join(map(repr, SAMPLE_BY))}")
    if num_rows is not None and num_rows < 1:
        raise ValueError(f"num_rows is {num_rows}, but must be at least 1")
    spec, data = _find_spec(source, path, columns)
    if data is None:
        shards: list[Shard] = [StoryShard(seed, split or "train", num_rows)]
    elif files := _find_local(data):
        if split or config_name or revision:
            raise ValueError(f"{data}: files have no split, config_name or revision")
        shards = [FileShard(number, file, sample_by) for number, file in enumerate(files)]
    else:
        config_name = config_name or (spec.config_name if spec else None)
        raw = load_raw(str(data), config_name, split, revision, streaming, cache_dir)
        maker = RowMaker(spec or _guess_spec(str(data), raw), options, seed, streaming)
        return _limit(_map_raw(raw, maker, str(data)), num_rows)
    spec = spec or _guess_spec(shards[0].name, shards[0], shards[1:])
    return _limit(_generate(shards, RowMaker(spec, options, seed, streaming), cache_dir), num_rows)


class SkipCounter:
    """Counts rows and why some were skipped; with `running`, warns at the 1st, 10th, 100th skipped row and so on."""

    def __init__(self, running: bool) -> None:
        self.running = running
        self.num_rows = 0
        self.reasons: Counter[str] = Counter()

    def skip(self, name: str, reason: str) -> None:
        """Count one more skipped row."""
        self.reasons[reason] += 1
        total = self.reasons.total()
        if self.running and str(total) == "1" + "0" * (len(str(total)) - 1):
            logger.warning("%s so far", self.describe(name))

    def describe(self, name: str) -> str:
        """The numbers as a sentence without its full stop."""
        reasons = ", ".join(f"{reason}: {number:,}" for reason, number in self.reasons.most_common())
        return f"{name}: skipped {self.reasons.total():,} of {self.num_rows:,} rows ({reasons})"


@dataclass(frozen=True)
class RowMaker:
    """Turns raw rows into checked rows and counts those that give none."""

    spec: DatasetSpec
    options: FormatOptions
    seed: int
    streaming: bool
    counter: SkipCounter = field(init=False, compare=False)

    def __post_init__(self) -> None:
        self.spec.choose_task(self.options)
        object.__setattr__(self, "counter", SkipCounter(running=self.streaming))

    @property
    def features(self) -> Features:
        """The columns of the rows and their types."""
        names = self.spec.made_columns(self.options)
        types = dict.fromkeys(LISTS, List(Value("string"))) | {"in_place": Value("bool")}
        return Features({name: types.get(name, Value("string")) for name in names})

    @property
    def fingerprint(self) -> str:
        """Changes with anything that the rows depend on besides the raw rows, this package's code included."""
        spec = self.spec.name, self.spec.columns, self.spec.optional
        return Hasher.hash([_code_hash(), *spec, self.options, self.seed])

    def __call__(self, raw: Any, index: Any, where: str) -> Row | None:
        """The row, or None if it is skipped; `index` is what the random draws depend on, besides the seed."""
        self.counter.num_rows += 1
        if self.spec.optional is not None and isinstance(raw, Mapping):
            lost = [name for name in LEARNED_WHERE if name not in self.spec.optional and raw.get(name) not in EMPTY]
            if lost:
                raise ValueError(f"{where}: has {', '.join(lost)}, which the first row of its file has not")
        try:
            row = self.spec.format_row(raw, random.Random(f"{self.seed} {index}"), self.options)
        except SkippedRow as reason:
            self.counter.skip(self.spec.name, str(reason))
            return None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        check_row(row, where)
        return {name: row.get(name) for name in self.features}

    def report(self, num_made: int) -> None:
        """Warn if rows were skipped; ValueError if none are left."""
        if not num_made:
            known = self.counter.num_rows > 0  # not if the rows were in the cache
            raise ValueError(f"no rows are left: {self.counter.describe(self.spec.name) if known else self.spec.name}")
        if self.counter.reasons:
            logger.warning(self.counter.describe(self.spec.name))


@dataclass(frozen=True)
class FileShard:
    """The raw rows of one file; two shards are equal only if the file has not been changed in between."""

    number: int
    path: Path
    sample_by: str
    stamp: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        status = self.path.stat()
        object.__setattr__(self, "stamp", (status.st_size, status.st_mtime_ns))

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.path)

    def __iter__(self) -> Iterator[tuple[str, str, Any]]:
        """Index, origin and raw row of each."""
        for row_number, (where, raw) in enumerate(read_file(self.path, self.sample_by)):
            yield f"{self.number} {row_number}", where, raw


@dataclass(frozen=True)
class StoryShard:
    """Stories of the project's own world; each belongs to one split for good, whatever the seed."""

    seed: int
    split: str
    num_rows: int | None
    name: str = "stories"

    def __post_init__(self) -> None:
        if self.num_rows is None:
            raise ValueError("stories: num_rows must be given")
        if self.split not in STORY_SPLITS:
            raise ValueError(f"stories: split is {self.split!r}, but must be one of {', '.join(STORY_SPLITS)}")

    def __iter__(self) -> Iterator[tuple[str, str, Any]]:
        """Index, origin and raw row of each."""
        for index in range(cast(int, self.num_rows)):
            rng = random.Random(f"{self.seed} {index}")
            story = generate_story(rng)
            while zlib.crc32(story.source.encode()) % 20 not in STORY_SPLITS[self.split]:
                story = generate_story(rng)
            yield str(index), f"stories, row {index}", asdict(story)


Shard = FileShard | StoryShard


def _find_spec(source: Any, path: Any, columns: Mapping[str, str] | None) -> tuple[DatasetSpec | None, Any]:
    """What to load (None for the stories), and how, unless that is to be guessed from its columns."""
    if not isinstance(source, str) or source not in REGISTRY:
        if path is not None:
            raise ValueError(f"path is for names of the registry ({', '.join(REGISTRY)}), but source is {source!r}")
        return (_spec_of_columns(str(source), columns) if columns else None), source
    spec = REGISTRY[source]
    if columns:
        raise ValueError(f"{source}: the registry knows the columns, so columns must be None")
    if source == "stories":
        if path is not None:
            raise ValueError("stories: they are made here, so path must be None")
        return spec, None
    if path is None and spec.hub_name is None:
        raise ValueError(f"{source}: path must be given")
    return spec, spec.hub_name if path is None else path


def _spec_of_columns(name: str, columns: Mapping[str, str]) -> DatasetSpec:
    if set(columns) == {"text"}:
        return DatasetSpec(name, TEXT, (columns["text"],), format_text, task=TEXT)
    if set(columns) == {"source", "target"}:
        return DatasetSpec(name, "pairs", (columns["source"], columns["target"]), format_pair)
    raise ValueError(f"columns has {sorted(columns)}, but must have 'text', or 'source' and 'target'")


def _guess_spec(name: str, raw: Any, others: Sequence[Shard] = ()) -> DatasetSpec:
    """Pairs if the first row has a target, else texts; what pairs say besides stands in the first row of any file."""
    if isinstance(raw, Dataset | IterableDataset):
        there: Collection[str] = _column_names(raw)
        where = name
    else:
        _, where, first = next(iter(raw))
        there = first if isinstance(first, Mapping) else ()
    for names in (("source", "target"), ("text",)):
        if set(names) <= set(there):
            spec = _spec_of_columns(name, {column: column for column in names})
            firsts: list[Any] = [next(iter(shard), ("", "", {}))[2] for shard in others]
            columns = set(there).union(*(first for first in firsts if isinstance(first, Mapping)))
            optional = tuple(column for column in LEARNED_WHERE if column in columns)
            return replace(spec, optional=optional) if "target" in names else spec
    needed = "'text', or 'source' and 'target'"
    raise ValueError(f"{where}: the columns are {sorted(there)}, but {needed} are needed; `columns` can rename them")


def _find_local(data: Any) -> list[Path]:
    """The files that `data` names; none for a folder or a name on the hub."""
    if isinstance(data, str | os.PathLike):
        return [] if os.path.isdir(data) or not is_file_name(str(data)) else find_files([data])
    files = find_files(data)
    if not files:
        raise ValueError("there are no files to load")
    return files


def load_raw(
    name: str,
    config_name: str | None,
    split: str | None,
    revision: str | None,
    streaming: bool,
    cache_dir: PathLike | None,
) -> Dataset | IterableDataset:
    """`datasets.load_dataset`, with what went wrong in the message."""
    cache_dir = None if cache_dir is None else str(cache_dir)
    with loading_by_name(name, f"a file here, in the registry ({', '.join(REGISTRY)}), "):
        raw = datasets.load_dataset(
            name, config_name, split=split or "train", revision=revision, streaming=streaming, cache_dir=cache_dir
        )
    if next(iter(raw), None) is None:
        raise ValueError(f"{name}: the data set holds no rows")
    return raw


@contextmanager
def loading_by_name(name: str, allowed: str = "") -> Iterator[None]:
    """Errors of `datasets` with what went wrong in the message, and what a name may be besides one of the hub."""
    try:
        yield
    except (FileNotFoundError, ConnectionError, HFValidationError) as error:
        message = f"{name!r}: must be {allowed}a folder of data files or a name on the hub ({error})"
        raise FileNotFoundError(message) from error
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{name}: {root_cause(error)}") from error


def root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _column_names(raw: Dataset | IterableDataset) -> list[str]:
    return raw.column_names or list(next(iter(raw)))  # a stream doesn't always know them beforehand


def _map_raw(raw: Dataset | IterableDataset, maker: RowMaker, name: str) -> Dataset | IterableDataset:
    _check_label_names(raw, maker.spec)
    make = partial(_make_batch, maker=maker, name=name)
    options = {"with_indices": True, "batched": True, "features": maker.features}
    options["remove_columns"] = _column_names(raw)
    if maker.streaming:
        return raw.map(make, batch_size=STREAM_BATCH, **options)
    made = raw.map(make, new_fingerprint=Hasher.hash([raw._fingerprint, maker.fingerprint]), **options)
    maker.report(len(made))
    return made


def _make_batch(batch: dict[str, list[Any]], indices: list[int], maker: RowMaker, name: str) -> dict[str, list[Any]]:
    raw_rows = (dict(zip(batch, values)) for values in zip(*batch.values()))
    rows = [maker(raw_row, index, f"{name}, row {index}") for raw_row, index in zip(raw_rows, indices)]
    return {column: [row[column] for row in rows if row] for column in maker.features}


def _check_label_names(raw: Dataset | IterableDataset, spec: DatasetSpec) -> None:
    label = (raw.features or {}).get("label")
    names = getattr(label, "names", None)
    if spec.label_names and names and tuple(names) != spec.label_names:
        raise ValueError(f"{spec.name}: the labels are {names}, but {list(spec.label_names)} are expected")


def _generate(shards: list[Shard], maker: RowMaker, cache_dir: PathLike | None) -> Dataset | IterableDataset:
    kwargs = {"features": maker.features, "gen_kwargs": {"shards": shards, "maker": maker}}
    if maker.streaming:
        return IterableDataset.from_generator(_made_rows, **kwargs)
    fingerprint = Hasher.hash([maker.fingerprint, shards])
    try:
        made = Dataset.from_generator(_made_rows, cache_dir=cache_dir, fingerprint=fingerprint, **kwargs)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise
    except ValueError:  # datasets loads no empty split
        if maker.counter.num_rows > maker.counter.reasons.total():
            raise
        maker.report(0)
    maker.report(len(made))
    return made


def _made_rows(shards: Sequence[Shard], maker: RowMaker) -> Iterator[Row]:
    rows = (maker(raw, index, where) for shard in shards for index, where, raw in shard)
    return (row for row in rows if row)


def _limit(rows: Dataset | IterableDataset, num_rows: int | None) -> Dataset | IterableDataset:
    if num_rows is None or (isinstance(rows, Dataset) and len(rows) <= num_rows):
        return rows
    return rows.take(num_rows)


@cache
def _code_hash() -> str:
    return Hasher.hash([path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))])


def format_registry() -> str:
    """The registry as a table: name, family, hub name, splits and columns."""
    lines = [("name", "family", "hub name", "splits", "columns")]
    for spec in REGISTRY.values():
        hub_name = spec.hub_name or "(offline)"
        lines.append((spec.name, spec.family, hub_name, ", ".join(spec.splits) or "-", ", ".join(spec.columns)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """List the registry, or write pairs of one of its data sets."""
    parser = argparse.ArgumentParser(description="Without --name: list the data sets. With it: write pairs of one.")
    parser.add_argument("--name", choices=list(REGISTRY))
    parser.add_argument("--split", help="train unless given")
    parser.add_argument("--num_rows", type=int, help="at most so many; all unless given")
    parser.add_argument("--output", help="a .jsonl or .jsonl.gz file")
    parser.add_argument("--path", nargs="+", help="files, a folder or a hub name instead of the data set's own")
    parser.add_argument("--task", help="what texts are made into, instead of the data set's own")
    parser.add_argument("--max_words", type=int, help="crop texts to whole sentences of so many words")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mask_token", default="<mask>")
    parser.add_argument("--answer_slot", default="", help="what begins every source, such as '<mask><mask> '")
    options = vars(parser.parse_args(arguments))
    name, output, path = options.pop("name"), options.pop("output"), options.pop("path")
    if name is None:
        print(format_registry())
        return
    if output is None:
        parser.error("--name needs --output")
    path = path[0] if path and len(path) == 1 else path  # a folder or a hub name is given alone
    rows = list(load_rows(name, path=path, streaming=True, **options))
    write_rows(output, rows)
    print(f"{output}: {len(rows):,} rows of {name}")


if __name__ == "__main__":
    main()

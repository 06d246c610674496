"""Where the rows of a task come from: drawn at random from rows that can be looked up, or read from a stream in order.

Both kinds give groups: a fixed number of rows each, where group number g is a pure function of the seed and of g.
"""

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node

Row = dict[str, Any]
Filled = tuple[list[Row], int]  # the rows of a group, and how many rows gave nothing for it
Fill = Callable[[Iterator[Row], random.Random], Filled]  # takes rows until it has made a group of them
Rows: TypeAlias = Sequence[Row] | Dataset | IterableDataset

PAIRS, TEXT = "pairs", "text"  # the kinds of rows
LOOK_UP_SIZE = 64  # rows fetched at once: from Arrow tables far faster than one by one


class DrawnRows:
    """Rows of one kind that can be looked up; every group draws its own, with replacement.

    Args:
        rows: List or Arrow data set, of which the rows at `indices` (n,) are of the kind.
    """

    def __init__(self, rows: Sequence[Row] | Dataset, indices: Sequence[int] | npt.NDArray[np.int64]):
        self.rows, self.indices = rows, indices

    def draw(self, rng: random.Random) -> Iterator[Row]:
        """Rows without end."""
        while True:
            drawn = [int(self.indices[rng.randrange(len(self.indices))]) for _ in range(LOOK_UP_SIZE)]
            yield from self.rows.__getitems__(drawn) if isinstance(self.rows, Dataset) else map(self._row, drawn)

    def _row(self, position: int) -> Row:
        return self.rows[position]

    def groups(self, fill: Fill, seed: str, process_index: int) -> "DrawnGroups":
        """Function from g to group number g of a process."""
        return DrawnGroups(self.draw, fill, f"{seed} {process_index}")


@dataclass
class DrawnGroups:
    """Every group is drawn by itself."""

    draw: Callable[[random.Random], Iterator[Row]]
    fill: Fill
    seed: str

    def __call__(self, number: int) -> Filled:
        rng = random.Random(f"{self.seed} {number}")
        return self.fill(self.draw(rng), rng)


class StreamedRows:
    """Rows of a stream: shuffled in a buffer, divided among processes, and again with a new shuffle in the next epoch.

    Args:
        kind: Leave out rows of another kind; None if there is only one.
        shuffle_buffer: Rows that the shuffle holds in memory.
    """

    def __init__(
        self, rows: IterableDataset, kind: str | None, process_index: int, num_processes: int, shuffle_buffer: int
    ):
        self.rows, self.kind, self.shuffle_buffer = rows, kind, shuffle_buffer
        self.process_index, self.num_processes = process_index, num_processes

    def epochs(self, seed: str) -> Iterator[Row]:
        """Rows without end, epoch after epoch. All processes shuffle alike, so that each can take its own part."""
        epoch, num_rows = 0, 1
        while num_rows:
            shuffle_seed = random.Random(f"{seed} epoch {epoch}").getrandbits(32)
            shuffled = self.rows.shuffle(seed=shuffle_seed, buffer_size=self.shuffle_buffer)
            num_rows = 0
            for row in _iterate(split_dataset_by_node(shuffled, self.process_index, self.num_processes)):
                if self.kind in (None, kind_of(row)):
                    num_rows += 1
                    yield row
            epoch += 1
        part = f"part {self.process_index} of {self.num_processes} of the stream"
        raise ValueError(f"there are no rows {'' if self.kind is None else f'of {self.kind} '}to train on in {part}")

    def groups(self, fill: Fill, seed: str, process_index: int) -> "StreamedGroups":
        """Function from g to group number g of a process."""
        return StreamedGroups(self.epochs, fill, seed, process_index)


class StreamedGroups:
    """Group number g of a stream is what lies after group g - 1: reading goes forwards, or starts again."""

    def __init__(self, open_stream: Callable[[str], Iterator[Row]], fill: Fill, seed: str, process_index: int):
        self.open_stream, self.fill, self.seed, self.process_index = open_stream, fill, seed, process_index
        self._stream: Iterator[Row] | None = None
        self._next, self._reader = 0, 0  # the number of the group that comes next, and the process that reads

    def __call__(self, number: int) -> Filled:
        # A forked worker of a data loader may not read on in the files of its parent.
        if self._stream is None or number < self._next or self._reader != os.getpid():
            self._stream, self._next, self._reader = self.open_stream(self.seed), 0, os.getpid()
        stream: Iterator[Row] = self._stream
        self._stream = None  # after an error in between, the next call starts again
        while self._next <= number:
            group = self.fill(stream, random.Random(f"{self.seed} {self.process_index} {self._next}"))
            self._next += 1
        self._stream = stream
        return group

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stream": None}  # an open stream can't be pickled


def kind_of(row: Mapping[str, Any]) -> str:
    """A row with a target is a pair, whatever else it has; columns that are None count as missing."""
    return PAIRS if row.get("target") is not None else TEXT


def split_kinds(
    rows: Rows, process_index: int, num_processes: int, shuffle_buffer: int
) -> dict[str, DrawnRows | StreamedRows]:
    """The rows of each kind that there are; the numbers say how a stream is divided and shuffled.

    Raises:
        ValueError: There are no rows, or no columns to train on, or a stream is to be divided in fewer processes.
    """
    if isinstance(rows, IterableDataset):
        if not 0 <= process_index < num_processes:
            raise ValueError(
                f"process_index={process_index}: must be at least 0 and below num_processes={num_processes}"
            )
        kinds = _kinds_of_columns(_stream_columns(rows))
        parts = process_index, num_processes, shuffle_buffer
        return {kind: StreamedRows(rows, kind if len(kinds) > 1 else None, *parts) for kind in kinds}
    if not len(rows):
        raise ValueError("there are no rows to train on")
    kinds = _kinds_of_columns(rows.column_names) if isinstance(rows, Dataset) else [PAIRS, TEXT]
    if len(kinds) == 1:
        return {kinds[0]: DrawnRows(rows, range(len(rows)))}
    is_pair = np.fromiter(_have_target(rows), bool, len(rows))
    indices = {PAIRS: np.flatnonzero(is_pair), TEXT: np.flatnonzero(~is_pair)}
    return {kind: DrawnRows(rows, positions) for kind, positions in indices.items() if len(positions)}


def _kinds_of_columns(columns: Sequence[str]) -> list[str]:
    has_pairs, has_text = {"source", "target"} <= set(columns), "text" in columns
    if not has_pairs and not has_text:
        raise ValueError(f'the rows have the columns {sorted(columns)}, but need "text", or "source" and "target"')
    return [PAIRS] * has_pairs + [TEXT] * has_text


def _have_target(rows: Sequence[Row] | Dataset) -> Iterator[bool]:
    """For each row whether it is a pair; of an Arrow data set only the validity of one column is read."""
    if not isinstance(rows, Dataset):
        return (kind_of(row) == PAIRS for row in rows)
    tables = rows.select_columns("target").with_format("arrow").iter(10_000)
    return (is_valid for table in tables for is_valid in table["target"].is_valid().to_pylist())


def _stream_columns(rows: IterableDataset) -> list[str]:
    first = next(_iterate(rows), None)
    if first is None:
        raise ValueError("there are no rows to train on: the stream is empty")
    return rows.column_names or list(first)


def _iterate(rows: IterableDataset) -> Iterator[Row]:
    """The rows of a stream, all of them: plain iteration in a worker of a data loader would leave out shards."""
    for batch in rows.iter(1):
        yield {name: values[0] for name, values in batch.items()}


class TaskSchedule:
    """The task of every batch, drawn by weight, and how many batches of that task came before it."""

    BLOCK = 4096  # batches drawn together

    def __init__(self, weights: dict[str, float], seed: int):
        self.tasks, self.weights, self.seed = list(weights), list(weights.values()), seed
        self._blocks: list[np.ndarray] = []
        self._counts = [np.zeros(len(weights), np.int64)]

    def __getitem__(self, index: int) -> tuple[str, int]:
        block, offset = divmod(index, self.BLOCK)
        while len(self._blocks) <= block:
            drawn = self._draw(len(self._blocks))
            self._counts.append(self._counts[-1] + np.bincount(drawn, minlength=len(self.tasks)))
            self._blocks.append(drawn)
        drawn = self._blocks[block]
        num_before = self._counts[block][drawn[offset]] + np.count_nonzero(drawn[:offset] == drawn[offset])
        return self.tasks[drawn[offset]], int(num_before)

    def _draw(self, block: int) -> np.ndarray:
        rng = random.Random(f"{self.seed} tasks {block}")
        return np.array(rng.choices(range(len(self.tasks)), self.weights, k=self.BLOCK), np.uint8)


def cut(rows: list[Row], size: int) -> list[list[Row]]:
    """Consecutive lists of `size` rows."""
    rest = iter(rows)
    return list(iter(lambda: list(islice(rest, size)), []))

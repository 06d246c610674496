"""Training batches of one task each, where batch number i is a pure function of the seed, of i and of the process.

So there is no state to save: a run that stopped goes on at the same position in the data.
"""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..configuration_yan import YanConfig
from ..data import TEXT_TASKS, AutoencoderCollator, FlowCollator, crop_sentences
from ..data.canvases import canvas_of, count_canvases
from ..data.encoding import encode_rows, pair_fields
from .stages import find_stage
from .streams import PAIRS, TEXT, DrawnRows, Filled, Row, Rows, TaskSchedule, cut, split_kinds

CANVAS_MULTIPLE = 8
WIDE_CANVAS_CHANCE = 0.3  # of a canvas wider than the batch needs, so that any width works at generation
MAX_TRIES = 1000

Batch = dict[str, Any]


class Group(NamedTuple):
    """Batches that were drawn together: the rows of each as token ids, and how many rows gave nothing."""

    batches: list[list[Row]]
    num_skipped: int


class TaskSampler(Dataset[Batch]):
    """Batches of the tasks that the rows and the stage allow, each task with its weight.

    Rows with source and target are the task "pairs". Rows with text are the task "text" in the autoencoder stage, and
    each of `TEXT_TASKS` in the flow stage and for the baselines, which get the flow stage's batches. A list or an
    Arrow data set is drawn from with replacement. From a stream each task takes its rows in order: shuffled in a
    buffer, divided among the processes, epoch after epoch with a new shuffle; to start in the middle the stream is
    read again up to there, though nothing is tokenised on the way.

    `bucket_batches` batches of a task are drawn together, sorted by their rows' numbers of tokens, cut, and dealt out
    in random order: every row is used once, beside rows of about its length. In memory there are never more rows than
    one such group for each task, and the buffer of a stream.

    In the flow stage, a target that needs several canvases gives one of them, drawn at random.

    A row that a task can't use (no sentence of `max_words` or fewer, an empty target) is skipped and counted in
    `num_skipped`; `num_truncated` and `num_cut_targets` are those of the collators. They count the groups and batches
    that this object gave.

    Args:
        rows: Rows as `read_rows` gives them, or a `datasets.Dataset` or `IterableDataset` with columns "text", or
            "source" and "target", or all of them with nulls. stage: "autoencoder", "flow" or a baseline.
        weights: Task to weight, at least 0; None for equal weights of all tasks that the rows allow.
        max_words: Texts are cropped to whole sentences of at most this many words.
        max_source_length: Longest source in tokens; config: gives canvas length and masking.
        length: Number of batches. seed, process_index: Choose the batches.
        bucket_batches: At least 1, which sorts nothing. shuffle_buffer: Rows that the shuffle of a stream holds.
        num_processes: That share a stream. origin: What the rows are called in errors.

    Raises:
        ValueError: No rows, an unknown task, one without rows, or no weight above 0; and when a batch is asked for:
            rows of which the task can use none.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        config: YanConfig,
        stage: str,
        batch_size: int,
        length: int,
        seed: int,
        weights: dict[str, float] | None = None,
        max_words: int = 24,
        max_source_length: int = 64,
        process_index: int = 0,
        num_processes: int = 1,
        bucket_batches: int = 1,
        shuffle_buffer: int = 10_000,
        origin: str = "the rows",
    ):
        _check_sizes(batch_size=batch_size, bucket_batches=bucket_batches, shuffle_buffer=shuffle_buffer)
        self.tokenizer, self.config, self.stage = tokenizer, config, find_stage(stage)
        self.batch_size, self.length, self.seed, self.process_index = batch_size, length, seed, process_index
        self.max_words, self.bucket_batches, self.num_skipped = max_words, bucket_batches, 0
        kinds = split_kinds(rows, process_index, num_processes, shuffle_buffer)
        self._rows = {task: kinds[kind] for kind in kinds for task in self.stage.tasks(kind)}
        self.weights = _check_weights(weights, list(self._rows), f"{origin} and stage={stage!r}")
        self._schedule = TaskSchedule(self.weights, seed)
        self._groups = {
            task: self._rows[task].groups(partial(self._fill, task), f"{seed} {task}", process_index)
            for task in self.weights
        }
        self._collator = self._make_collator(min(max_source_length, config.max_prompt_length))
        self._current: dict[str, tuple[int, list[list[Row]]]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self.length:
            raise IndexError(index)
        # All processes work on one task at a time, so that they take about as long.
        task, group = self.group_of(index)
        if not self.has_group(task, group):
            self._current.pop(task, None)  # never two groups in memory
            self.take_group(task, group, self.make_group(task, group))
        position = self._schedule[index][1] % self.bucket_batches
        rng = random.Random(f"{self.seed} {index} {self.process_index}")
        return self._collate(self._current[task][1][position], rng)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The batches from number `start` on, as the iteration over all of them gives them.

        Raises:
            ValueError: `start` is not from 0 to the number of batches.
        """
        if not 0 <= start <= self.length:
            raise ValueError(f"start={start}: must be from 0 to length={self.length}")
        return map(self.__getitem__, range(start, self.length))

    def group_of(self, index: int) -> tuple[str, int]:
        """Task and number of the group that batch number `index` is of, the same in every process."""
        task, number = self._schedule[index]
        return task, number // self.bucket_batches

    def make_group(self, task: str, group: int) -> Group:
        """Draw and tokenise the rows of a group: what takes the time, in this process or a worker."""
        rows, num_skipped = self._groups[task](group)
        rows = encode_rows(self.tokenizer, rows)
        rows.sort(key=_num_tokens)
        batches = cut(rows, self.batch_size)
        # Without the process: all of them have their long batches at the same time.
        random.Random(f"{self.seed} {task} {group} order").shuffle(batches)
        return Group(batches, num_skipped)

    def has_group(self, task: str, group: int) -> bool:
        """Whether it is the one that is kept, the last of its task."""
        return self._current.get(task, (None,))[0] == group

    def take_group(self, task: str, group: int, made: Group) -> None:
        """Keep a group, which replaces that of its task before it."""
        self._current[task] = group, made.batches
        self.num_skipped += made.num_skipped

    def batch(self, task: str, rng: random.Random) -> Batch:
        """One batch of `task` drawn with `rng`. Raises ValueError if the rows are a stream."""
        source = self._rows[task]
        if not isinstance(source, DrawnRows):
            raise ValueError("single batches can't be drawn from a stream: give a list or a map-style data set")
        rows, num_skipped = self._fill(task, source.draw(rng), rng, self.batch_size)
        self.num_skipped += num_skipped
        return self._collate(encode_rows(self.tokenizer, rows), rng)

    @property
    def num_truncated(self) -> int:
        """Rows of which the source, or the text of an autoencoder, did not fit."""
        return self._collator.num_truncated

    @property
    def num_cut_targets(self) -> int:
        """Targets that did not fit into a canvas with their EOS."""
        return getattr(self._collator, "num_cut_targets", 0)

    def _fill(self, task: str, rows: Iterator[Row], rng: random.Random, size: int | None = None) -> Filled:
        """As many rows as a group has, made for the task of the next that it can use, and how many it could not."""
        made: list[Row] = []
        size, tries, num_skipped = size or self.batch_size * self.bucket_batches, 0, 0
        for row in rows:
            made_row = self._make_row(task, row, rng)
            tries = 0 if made_row else tries + 1
            num_skipped += not made_row
            if made_row:
                made.append(made_row)
            if len(made) == size:
                break
            if tries == MAX_TRIES:
                words = f"2 to max_words={self.max_words} words, between white space,"
                lack = "target" if task == PAIRS else f"sentence of {words} to use"
                raise ValueError(f"{MAX_TRIES} rows in a row have no {lack} for task {task}")
        return made, num_skipped

    def _make_row(self, task: str, row: Row, rng: random.Random) -> Row | None:
        """The row's source and target, or its text, for the task; None if that can't use it."""
        if task == PAIRS:
            return pair_fields(row) if _is_usable_pair(row) else None
        text = crop_sentences(row.get("text") or "", self.max_words, rng)
        if not text:
            return None
        return {"text": text} if task == TEXT else self._make_pair(task, text, rng)

    def _make_pair(self, task: str, text: str, rng: random.Random) -> Row | None:
        details = {"count_tokens": lambda span: len(self.tokenizer.tokenize(span))} if task == "infilling" else {}
        pair = TEXT_TASKS[task](text, rng, self.tokenizer.mask_token, **details)
        return pair and pair_fields(pair)

    def _make_collator(self, longest: int) -> AutoencoderCollator | FlowCollator:
        config = self.config
        if self.stage.corrupts:
            options = {name: getattr(config.objective, name) for name in ("mask_ratio", "max_span_len")}
            names = ("num_answer_slots", "copy_prompt_to_slots", "vertices_per_token")
            options |= {name: getattr(config, name) for name in names}
            longest = min(longest + config.num_answer_slots, config.max_position_embeddings)
            return AutoencoderCollator(self.tokenizer, longest, **options)
        return FlowCollator(self.tokenizer, longest, config.canvas_length, CANVAS_MULTIPLE)

    def _collate(self, rows: list[Row], rng: random.Random) -> Batch:
        if isinstance(self._collator, AutoencoderCollator):
            return dict(self._collator(rows, torch.Generator().manual_seed(rng.getrandbits(60))))
        batch: Batch = dict(self._collator([self._draw_canvas(row, rng) for row in rows]))
        batch["canvas_length"] = width = batch["labels"].shape[1]
        if self.config.vertices_per_token > 1:  # how many vertices there are must not tell how long the text is
            batch["canvas_length"] = self.config.canvas_length
        elif rng.random() < WIDE_CANVAS_CHANCE:
            longest = self.config.canvas_length  # which `generate` takes, and may be no multiple
            batch["canvas_length"] = rng.choice([*range(width, longest, CANVAS_MULTIPLE), longest])
        return batch

    def _draw_canvas(self, row: Row, rng: random.Random) -> Row:
        length = self.config.canvas_length
        number = count_canvases(row, length)
        return row if number == 1 else dict(canvas_of(row, length, rng.randrange(number)))


def _num_tokens(row: Row) -> int:
    return sum(len(row[name]) for name in ("input_ids", "source", "target") if name in row)


def _is_usable_pair(row: Row) -> bool:
    source, target = row.get("source"), row.get("target")
    return (
        source is not None and target is not None and bool(target.strip() if isinstance(target, str) else len(target))
    )


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: must be at least 1")


def _check_weights(weights: dict[str, float] | None, tasks: list[str], origin: str) -> dict[str, float]:
    weights = dict.fromkeys(tasks, 1.0) if weights is None else weights
    unknown = sorted(set(weights) - set(tasks))
    if unknown:
        raise ValueError(f"no rows for the task {', '.join(unknown)}: {origin} allow {', '.join(tasks)}")
    if not all(weight >= 0 for weight in weights.values()) or not sum(weights.values()):
        raise ValueError(f"task weights {weights}: must be at least 0 and not all 0")
    return weights

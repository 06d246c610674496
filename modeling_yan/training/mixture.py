"""Training batches of one task each, where batch number i is a pure function of the seed and of i.

So there is no state to save: a run that stopped goes on at the same place in the data.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..data import TEXT_TASKS, AutoencoderCollator, FlowCollator, crop_sentences

Row = dict[str, Any]
PAIRS, TEXT = "pairs", "text"
CANVAS_MULTIPLE = 8
WIDE_CANVAS_CHANCE = 0.3  # of a canvas wider than the batch needs, so that any width works at generation
MAX_TRIES = 1000


class TaskMixture(Dataset):
    """Batches of the tasks that the rows and the stage allow, each task with its weight.

    Rows with source and target are the task "pairs". Rows with text are the task "text" in the autoencoder stage, and
    each of `TEXT_TASKS` in the flow stage.

    Args:
        rows: Rows as `read_rows` gives them. stage: "autoencoder" or "flow".
        weights: Task to weight, at least 0; None for equal weights of all tasks that the rows allow.
        max_words: Texts are cropped to whole sentences of at most so many words.
        max_source_length: Longest source in tokens; config: gives canvas length and masking.
        length: Number of batches. seed: Chooses them. micro_batches: Batches of one update, all of one task.

    Raises:
        ValueError: An unknown task, one without rows, or no weight above 0.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        config,
        stage: str,
        batch_size: int,
        length: int,
        seed: int,
        weights: dict[str, float] | None = None,
        max_words: int = 24,
        max_source_length: int = 64,
        micro_batches: int = 1,
    ):
        self.tokenizer, self.config, self.stage = tokenizer, config, stage
        self.batch_size, self.length, self.seed, self.micro_batches = batch_size, length, seed, micro_batches
        self.max_words, self.max_source_length = max_words, max_source_length
        self.pairs = [row for row in rows if "target" in row]
        self.texts = [row for row in rows if "target" not in row]
        if stage not in COLLATE:
            raise ValueError(f"stage={stage!r}: must be one of {', '.join(COLLATE)}")
        self.weights = _check_weights(weights, self._tasks())

    def _tasks(self) -> list[str]:
        text_tasks = [TEXT] if self.stage == "autoencoder" else list(TEXT_TASKS)
        return [PAIRS] * bool(self.pairs) + text_tasks * bool(self.texts)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.length:
            raise IndexError(index)
        # All batches of an update are of one task, so that the processes take about as long.
        task_rng = random.Random(f"{self.seed} task {index // self.micro_batches}")
        task = task_rng.choices(list(self.weights), list(self.weights.values()))[0]
        return self.batch(task, random.Random(f"{self.seed} batch {index}"))

    def batch(self, task: str, rng: random.Random) -> Row:
        """One batch of `task`, ready for the stage's model."""
        rows = [self._draw_row(task, rng) for _ in range(self.batch_size)]
        return COLLATE[self.stage](self, rows, rng)

    def _draw_row(self, task: str, rng: random.Random) -> Row:
        if task == PAIRS:
            return rng.choice(self.pairs)
        for _ in range(MAX_TRIES):
            text = crop_sentences(rng.choice(self.texts)["text"], self.max_words, rng)
            row = text and ({"text": text} if task == TEXT else self._make_pair(task, text, rng))
            if row:
                return row
        raise ValueError(f"{MAX_TRIES} texts in a row have no sentence of max_words={self.max_words} for task {task}")

    def _make_pair(self, task, text, rng):
        details = {"count_tokens": lambda span: len(self.tokenizer.tokenize(span))} if task == "infilling" else {}
        return TEXT_TASKS[task](text, rng, self.tokenizer.mask_token, **details)

    def _collate_autoencoder(self, rows, rng):
        config = self.config
        collator = AutoencoderCollator(
            self.tokenizer,
            max_length=min(self.max_source_length, config.max_position_embeddings),
            mask_ratio=config.mask_ratio,
            max_span_len=config.max_span_len,
            seed=rng.getrandbits(60),
        )
        return collator(rows)

    def _collate_flow(self, rows, rng):
        longest = min(self.max_source_length, self.config.max_position_embeddings)
        batch = FlowCollator(self.tokenizer, longest, self.config.canvas_length, CANVAS_MULTIPLE)(rows)
        batch["canvas_length"] = width = batch["labels"].shape[1]
        if rng.random() < WIDE_CANVAS_CHANCE:
            batch["canvas_length"] = rng.randrange(width, self.config.canvas_length + 1, CANVAS_MULTIPLE)
        return batch


COLLATE: dict[str, Callable] = {
    "autoencoder": TaskMixture._collate_autoencoder,
    "flow": TaskMixture._collate_flow,
}


def _check_weights(weights, tasks):
    if not tasks:
        raise ValueError("there are no rows to train on")
    weights = dict.fromkeys(tasks, 1.0) if weights is None else weights
    unknown = sorted(set(weights) - set(tasks))
    if unknown:
        raise ValueError(
            f"no rows for the task {', '.join(unknown)}: the files and the stage allow {', '.join(tasks)}"
        )
    if not all(weight >= 0 for weight in weights.values()) or not sum(weights.values()):
        raise ValueError(f"task weights {weights}: must be at least 0 and not all 0")
    return weights

"""Scores of what a Seq2SeqTrainer's model generates for held-out rows, and a few of its texts to look at."""

import random
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedTokenizerBase

from ..data.rows import Row
from ..evaluation import exact_match, rouge_scores, unicode_words


def rouge_l(prediction: str, target: str) -> float:
    """ROUGE-L of words of any script."""
    return rouge_scores([prediction], [target], names=("rougeL",), tokenize=unicode_words)["rougeL"][0]


METRICS = {"exact_match": exact_match, "rouge_l": rouge_l}
WIDTH = 100  # characters of a text that is shown


class Samples:
    """`compute_metrics` of a trainer: the mean exact match and ROUGE-L of the answers.

    A target counts as the tokenizer writes it, perhaps in lower case. One with unknown characters is never matched. At
    every evaluation source, wanted and generated text of the same few rows are printed, above the progress bar.

    Args:
        tokenizer: The model's tokenizer.
        rows: The N held-out rows of `source` and `target`.
        num_canvases: Number of rows in the evaluated data set for each of them, one a canvas; 1 each if None. Only the
            first one has the row's own source.
        is_shown: Whether texts are printed, which one process of several does.
        number: Number of rows that are printed.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        num_canvases: Sequence[int] | None = None,
        is_shown: bool = True,
        number: int = 3,
    ) -> None:
        self.tokenizer, self.rows = tokenizer, rows
        self.places = np.cumsum([0, *(num_canvases or [1] * len(rows))])[:-1]
        targets = tokenizer([row["target"] for row in rows], add_special_tokens=False)["input_ids"]
        self.wanted = tokenizer.batch_decode(targets)  # labels have one canvas alone
        chosen = sorted(random.Random(0).sample(range(len(rows)), min(number, len(rows))))
        self.shown = chosen if is_shown else []

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        generated = self._decode(np.asarray(prediction.predictions)[self.places])
        for index in self.shown:
            source, wanted = self.rows[index]["source"], self.wanted[index]
            texts = {"source": source, "wanted": wanted, "generated": generated[index]}
            tqdm.write("\n".join(f"{name:>9}: {_shorten(text)}" for name, text in texts.items()))
        pairs = list(zip(generated, self.wanted, strict=True))
        return {name: float(np.mean([metric(*pair) for pair in pairs])) for name, metric in METRICS.items()}

    def _decode(self, ids: Any) -> list[str]:
        known = np.where(ids < 0, self.tokenizer.pad_token_id, ids)
        return self.tokenizer.batch_decode(known, skip_special_tokens=True)


def _shorten(text: str) -> str:
    return textwrap.shorten(text, WIDTH, placeholder=" ...")

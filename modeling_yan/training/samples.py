"""Scores of what a Seq2SeqTrainer's model generates for held-out rows, and a few of its texts to look at."""

import random
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedTokenizerBase

from ..data.rows import Row
from ..evaluation import exact_match, rouge_l

METRICS = {"exact_match": exact_match, "rouge_l": rouge_l}
WIDTH = 100  # characters of a text that is shown


class Samples:
    """`compute_metrics` of a trainer: the mean exact match and ROUGE-L of the answers.

    At every evaluation it prints source, wanted and generated text of the same few rows, above the bar of progress.

    Args:
        rows: Those that are evaluated, in their order.
        is_shown: Whether texts are printed, which one process of several does.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], is_shown: bool = True, number: int = 3
    ) -> None:
        self.tokenizer, self.rows = tokenizer, rows
        targets = tokenizer([row["target"] for row in rows], add_special_tokens=False)["input_ids"]
        self.wanted = tokenizer.batch_decode(targets, skip_special_tokens=True)  # labels have one canvas alone
        chosen = sorted(random.Random(0).sample(range(len(rows)), min(number, len(rows))))
        self.shown = chosen if is_shown else []

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        generated = self._decode(prediction.predictions)
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

"""Batches for TRL's SFTTrainer: what it makes of rows of prompt and completion, taken apart for the flow again."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks_yan import IGNORE_INDEX
from .canvases import split_targets
from .collators import Batch, FlowCollator
from .encoding import check_rows
from .masking import Ids

BROKEN = "\ufffd"  # what a decoder gives for half a character


class CompletionCollator:
    """Batches of `FlowCollator` for rows of TRL's SFTTrainer: prompts are sources, completions are targets.

    A row has `input_ids`, the prompt and the completion, and `labels`, which are -100 for the prompt. In a chat with
    `assistant_only_loss` every turn of the assistant is a target, and all turns before it are its source. The text of
    a completion is tokenized separately, like every target. The EOS of SFTTrainer is its end. Without a prompt the
    source is a single BOS. A completion longer than one canvas gives a pair for every canvas (`split_targets`).
    Sources are cut as in `FlowCollator`.

    Args:
        tokenizer: The `processing_class` of the trainer.
        max_source_length, canvas_length, model: As in `FlowCollator`.
        allow_no_prompts: Whether a batch may have no prompt at all, which teaches to generate out of nothing. A chat
            without `assistant_only_loss` looks like that, too.

    Raises:
        ValueError: A row has other keys (`packing` and datasets that were not prepared give such), or no label; or
            no row of a batch has a prompt.

    Returns:
        `input_ids` and `attention_mask` (B, Ls), and `labels` (B, Lt), int64, of a list of rows.

    Example:

        >>> from transformers import AutoTokenizer
        >>> from modeling_yan.data import CompletionCollator
        >>> tokenizer = AutoTokenizer.from_pretrained("examples/checkpoints/yan-transformer-tiny")
        >>> collator = CompletionCollator(tokenizer, max_source_length=32, canvas_length=8)
        >>> ids = tokenizer("Who has the hat?")["input_ids"]
        >>> batch = collator([{"input_ids": [*ids, 9, 2], "labels": [-100] * len(ids) + [9, 2]}])
        >>> sorted(batch)
        ['attention_mask', 'input_ids', 'labels']
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_source_length: int | None = None,
        canvas_length: int | None = None,
        model: PreTrainedModel | None = None,
        allow_no_prompts: bool = False,
    ) -> None:
        self.tokenizer, self.allow_no_prompts = tokenizer, allow_no_prompts
        self.pairs = FlowCollator(tokenizer, max_source_length, canvas_length, model=model)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        check_rows(rows)
        pairs = [pair for row in rows for pair in self._take_apart(row)]
        if not (self.allow_no_prompts or any(pair["source"] for pair in pairs)):
            raise ValueError(
                "no row of the batch has a prompt: the labels are all of it. Set assistant_only_loss=True for chats, "
                "give rows of prompt and completion, or learn texts out of nothing with allow_no_prompts=True of "
                "CompletionCollator"
            )
        return self.pairs(split_targets(pairs, self.tokenizer, self.pairs.canvas_length))

    def _take_apart(self, row: Mapping[str, Any]) -> list[dict[str, Ids]]:
        """A pair for every run of labels."""
        if not {"input_ids", "labels"} <= row.keys() or len(row["input_ids"]) != len(row["labels"]):
            raise ValueError(f"a row has the keys {sorted(row)}, but input_ids and labels of one length are needed")
        is_target = np.asarray(row["labels"]) != IGNORE_INDEX
        edges = np.flatnonzero(np.diff(is_target, prepend=False, append=False))
        if not len(edges):
            raise ValueError(f"a row of {len(is_target)} tokens has no label: does max_length cut the completion off?")
        ids = list(row["input_ids"])
        return [
            {"source": ids[:start], "target": self._target(ids[start:stop])} for start, stop in edges.reshape(-1, 2)
        ]

    def _target(self, ids: list[int]) -> list[int]:
        """The tokens of the same text when it stands alone, without its EOS."""
        ids = ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids
        text = self.tokenizer.decode(ids)
        alone = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        is_same = BROKEN not in text and self.tokenizer.decode(alone) == text
        return alone if is_same else ids

"""Batches for TRL's SFTTrainer: what it makes of rows of prompt and completion, taken apart for the flow again."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .collators import IGNORED, Batch, FlowCollator, Ids, check_rows


class CompletionCollator:
    """Rows as SFTTrainer prepares them -> the batches of `FlowCollator`: prompts are sources, completions targets.

    A row has `input_ids`, prompt and completion in one, and `labels`, -100 on the prompt and the ids on the
    completion. The EOS that SFTTrainer puts behind a completion counts as its end. Without a prompt the source is a
    single BOS. Sources and targets are cut as in `FlowCollator`.

    Args:
        tokenizer: The `processing_class` of the trainer.
        max_source_length, canvas_length: Longest prompt, and longest completion with its EOS, in tokens.

    Raises:
        ValueError: A row has other keys (`packing` and datasets that were not prepared give such), or ignored tokens
            in or behind its completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_source_length: int, canvas_length: int):
        self.eos_token_id = tokenizer.eos_token_id
        self.pairs = FlowCollator(tokenizer, max_source_length=max_source_length, canvas_length=canvas_length)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        check_rows(rows)
        return self.pairs([self._take_apart(row) for row in rows])

    def _take_apart(self, row: Mapping[str, Any]) -> dict[str, Ids]:
        if not {"input_ids", "labels"} <= row.keys() or len(row["input_ids"]) != len(row["labels"]):
            raise ValueError(f"a row has the keys {sorted(row)}, but input_ids and labels of one length are needed")
        start = next((i for i, label in enumerate(row["labels"]) if label != IGNORED), len(row["labels"]))
        target = list(row["labels"][start:])
        if IGNORED in target:
            raise ValueError(f"labels {row['labels']}: {IGNORED} is allowed only before the completion")
        if target and target[-1] == self.eos_token_id:
            target.pop()
        return {"source": list(row["input_ids"][:start]), "target": target}

"""Rows as token ids, and where in them the target of a pair is learned.

A target stands after its source unless the row says otherwise, in one of two fields of text, which tasks write:

- `answer_slot`: the mask tokens that the source begins with, such as "<mask><mask> "; the target goes into their
  positions. Empty for a source whose first mask token is no such slot.
- `in_place`: true if the target is the source with its mask tokens replaced; what they hide is learned.

Rows of token ids say the same in ids, and `encode_rows` makes the one out of the other:

- `answer_span`: start and stop of the slot among the source's tokens, equal if there is none.
- `loss_mask`: a number for each token of the source, 1 where the target's token in its position is learned; only for a
  target in its source's positions.

A row without any of them gets them by `infer_places`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .masking import Ids

Row = Mapping[str, Any]
EncodedRow = dict[str, Any]
PLACES = ("answer_span", "loss_mask")


def check_rows(rows: Sequence[Row]) -> None:
    """Raise ValueError unless there is at least one row, and each is a mapping."""
    if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence) or not rows:
        raise ValueError(f"rows={rows!r:.60}: must be a list of at least one row")
    for row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"row {row!r:.60}: must be a mapping from names to texts or token ids")


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[EncodedRow]:
    """Rows as token ids: `source` and `target` of a pair, else the `input_ids`; ids that are there already stay.

    A source gets the special tokens that the tokenizer adds to a prompt, because the prompt of `generate` has them;
    what the model generates has none. A column that is None counts as missing. A pair has `answer_span`, and if its
    target stands in its source's positions `loss_mask`, too.

    Raises:
        ValueError: a row has neither text nor target, or a target without source, or a field that does not fit.
    """
    check_rows(rows)
    is_pair = [row.get("target") is not None for row in rows]
    learned = iter(_encode(tokenizer, [_learned_text(row) for row in rows], add_special_tokens=False))
    given = [entry(row, "source") for row, pair in zip(rows, is_pair) if pair]
    sources = iter(_encode(tokenizer, given, add_special_tokens=True))
    return [
        _with_places(tokenizer, row, next(sources), next(learned)) if pair else {"input_ids": next(learned)}
        for row, pair in zip(rows, is_pair)
    ]


def pair_fields(row: Row) -> dict[str, Any]:
    """What `encode_rows` reads of a pair."""
    return {name: row[name] for name in ("source", "target", "answer_slot", "in_place", *PLACES) if name in row}


def infer_places(tokenizer: PreTrainedTokenizerBase, source: Ids, target: Ids) -> EncodedRow:
    """The `answer_span` and `loss_mask` of a row that says nothing: made by hand, or before rows had these fields.

    The mask tokens that a source begins with are its answer slot; a BOS may stand before them. A source that is its
    target but for mask tokens, not all of it, has its target in its positions.
    """
    spans: EncodedRow = {"answer_span": (0, 0)}
    if tokenizer.mask_token_id is None or tokenizer.mask_token_id not in source:
        return spans
    ids, start = np.asarray(source), _num_before(tokenizer, source)
    is_shown = ids != tokenizer.mask_token_id
    spans["answer_span"] = start, start + int(np.append(is_shown[start:], True).argmax())
    if len(ids) == len(target) and is_shown.any() and (ids == np.asarray(target))[is_shown].all():
        spans["loss_mask"] = _find_masks(tokenizer, ids)
    return spans


def _with_places(tokenizer: PreTrainedTokenizerBase, row: Row, source: Ids, target: Ids) -> EncodedRow:
    """Source and target, and where the target is learned: as the row says, in ids or in text, or as it is inferred."""
    pair: EncodedRow = {"source": source, "target": target}
    given = {name: row[name] for name in PLACES if row.get(name) is not None}
    if given:
        return {**pair, "answer_span": (0, 0), **_checked(given, len(source))}
    if row.get("in_place"):
        return {**pair, "answer_span": (0, 0), "loss_mask": _find_masks(tokenizer, source)}
    slot = row.get("answer_slot")
    if slot is None:
        return {**pair, **infer_places(tokenizer, source, target)}
    if not isinstance(slot, str):
        raise ValueError(f"answer_slot={slot!r}: must be a string of mask tokens, or empty")
    start = _num_before(tokenizer, source)
    return {**pair, "answer_span": (start, start + (slot.count(tokenizer.mask_token) if slot else 0))}


def _checked(spans: EncodedRow, length: int) -> EncodedRow:
    """The fields of ids; ValueError for those that do not fit a source of `length` tokens."""
    start, stop = spans.get("answer_span", (0, 0))
    if not 0 <= start <= stop <= length:
        raise ValueError(f"answer_span={(start, stop)}: must be start and stop in a source of {length} tokens")
    if len(spans.get("loss_mask", range(length))) != length:
        raise ValueError(f"loss_mask of {len(spans['loss_mask'])}: must have one number for each of {length} tokens")
    return spans


def _num_before(tokenizer: PreTrainedTokenizerBase, source: Ids) -> int:
    """How many special tokens stand before the text of a source: a BOS or none."""
    begins = [token for token in (tokenizer.bos_token_id, tokenizer.cls_token_id) if token is not None]
    return int(len(source) > 0 and source[0] in begins)


def _find_masks(tokenizer: PreTrainedTokenizerBase, source: Ids) -> np.ndarray[Any, Any]:
    return np.equal(np.asarray(source), tokenizer.mask_token_id).astype(np.int64)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | Ids], add_special_tokens: bool) -> list[Ids]:
    """Encode the strings, in one call because that is faster; leave token ids as they are."""
    strings = [text for text in texts if isinstance(text, str)]
    options = {"add_special_tokens": add_special_tokens, "return_attention_mask": False}
    encoded = iter(tokenizer(strings, **options)["input_ids"] if strings else [])
    return [next(encoded) if isinstance(text, str) else text for text in texts]


def _learned_text(row: Row) -> str | Ids:
    """What the autoencoder learns to restore: the target of a pair, or the text."""
    for name in ("target", "input_ids"):
        if row.get(name) is not None:
            return entry(row, name)
    return entry(row, "text")


def entry(row: Row, key: str) -> str | Ids:
    if row.get(key) is None:
        found = sorted(name for name, value in row.items() if value is not None)
        raise ValueError(f'a row has the keys {found}, but "{key}" is needed')
    if not isinstance(row[key], str | Sequence | np.ndarray | torch.Tensor) or isinstance(row[key], bytes):
        raise ValueError(f'"{key}" of a row is {row[key]!r:.60}: must be a string or token ids')
    value: str | Ids = row[key]
    return value

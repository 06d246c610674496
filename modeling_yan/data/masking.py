"""Rows of different lengths, and the spans of them that text infilling hides.

B: rows of the batch; L: its width; N: tokens of all rows.
"""

from collections.abc import Sequence
from itertools import chain
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch

MAX_MASK_RATIO = 0.5  # up to here there is always a kept token for every span to stand before

Ids = Sequence[int] | np.ndarray[Any, Any]


class Ragged(NamedTuple):
    """Rows of different lengths (B,), all their tokens (N,) in one array."""

    tokens: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]


def check_masking(mask_ratio: float, max_span_len: int) -> None:
    if not isinstance(mask_ratio, Real) or isinstance(mask_ratio, bool) or not 0 <= mask_ratio <= MAX_MASK_RATIO:
        raise ValueError(f"mask_ratio is {mask_ratio!r}, but must be from 0 to {MAX_MASK_RATIO}")
    check_length("max_span_len", max_span_len)


def draw_spans(
    lengths: np.ndarray[Any, Any],
    mask_ratio: float | np.ndarray[Any, Any],
    max_span_len: int,
    generator: torch.Generator | None,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(B, n) first token and length of the spans to hide in rows of (B,) `lengths`, in order; lengths may be 0.

    Spans have 1 to `max_span_len` tokens (uniformly drawn, one of a row may be cut short) and never touch. A row of
    n tokens loses `mask_ratio` * n of them, rounded up or down at random, so that short rows lose as much on average.
    `mask_ratio` is one number, or one a row, up to 0.5.
    """
    num_hidden = (mask_ratio * lengths + torch.rand(len(lengths), generator=generator).numpy()).astype(np.int64)
    spans = _draw_span_lengths(num_hidden, max_span_len, generator)
    # Deal the spans out to the gaps before and after the kept tokens, each to one of its own: the lowest scores win.
    scores = torch.rand(len(lengths), int(lengths.max()) + 1, generator=generator)
    scores.numpy()[np.arange(scores.shape[1]) > (lengths - num_hidden)[:, None]] = 2.0  # there are not so many gaps
    gaps = scores.topk(spans.shape[1], largest=False).indices.numpy()
    # Sort the spans by their gaps, both in one number.
    gaps, spans = np.divmod(np.sort(gaps * (max_span_len + 1) + spans), max_span_len + 1)
    return gaps + spans.cumsum(1) - spans, spans


def _draw_span_lengths(
    num_hidden: np.ndarray[Any, Any], max_span_len: int, generator: torch.Generator | None
) -> np.ndarray[Any, Any]:
    """(B, n) lengths that add up to (B,) `num_hidden`, followed by zeros; the last that counts may be cut short."""
    shape = len(num_hidden), int(num_hidden.max())
    proposed = torch.randint(1, max_span_len + 1, shape, generator=generator).numpy()
    left = num_hidden[:, None] - proposed.cumsum(1) + proposed
    spans = np.minimum(proposed, np.maximum(left, 0))
    return spans[:, : np.count_nonzero(spans.any(0))]


def hide_spans(rows: Ragged, starts: np.ndarray[Any, Any], spans: np.ndarray[Any, Any], mask_token_id: int) -> Ragged:
    """The rows with every span collapsed into one mask token; `starts` and `spans` (B, n) as `draw_spans` gives."""
    tokens, lengths = rows.tokens.copy(), rows.lengths
    is_span = spans > 0
    first = (starts + (lengths.cumsum() - lengths)[:, None])[is_span]
    changes = np.zeros(len(tokens) + 1, np.int8)  # +1 where a span begins, -1 where it is over
    changes[first] += 1
    changes[first + spans[is_span]] -= 1
    is_shown = changes[:-1].cumsum(dtype=np.int8) == 0
    is_shown[first] = True
    tokens[first] = mask_token_id
    return Ragged(tokens[is_shown], lengths - spans.sum(1) + is_span.sum(1))


def check_length(name: str, value: int | None, least: int = 1) -> None:
    if value is None:
        raise ValueError(f"{name} is None, but must be at least {least}, or model be given, which knows it")
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}, but must be an integer of at least {least}")


def lengths_of(sequences: Sequence[Ids]) -> np.ndarray[Any, Any]:
    return np.fromiter(map(len, sequences), np.int64, len(sequences))


def flatten(sequences: Sequence[Ids]) -> Ragged:
    lengths = lengths_of(sequences)
    if all(isinstance(ids, list) for ids in sequences):  # faster than an array for each
        tokens = np.array(list(chain.from_iterable(sequences)))
    else:
        tokens = np.concatenate([np.asarray(ids, dtype=None if len(ids) else np.int64) for ids in sequences])
    if len(tokens) and (tokens.dtype.kind not in "iu" or tokens.ndim != 1 or tokens.min() < 0):
        found = tokens.min() if tokens.dtype.kind in "iu" else f"{tokens.reshape(-1)[0]!r} of {tokens.dtype}"
        raise ValueError(f"token ids hold {found}: must be lists of integers of at least 0")
    return Ragged(tokens.astype(np.int64), lengths)


def is_between(starts: np.ndarray[Any, Any], ends: np.ndarray[Any, Any], width: int) -> np.ndarray[Any, Any]:
    """(B, width), True from the column `starts` (B,) of a row to the one before `ends` (B,)."""
    index = np.arange(width)
    return (index >= starts[:, None]) & (index < ends[:, None])


def pad_rows(rows: Ragged, width: int, value: int, starts: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
    """(B, width) with every row at its column `starts` (B,), 0 if None, and `value` around it."""
    starts = np.zeros_like(rows.lengths) if starts is None else starts
    filled = np.full((len(rows.lengths), width), value)
    filled[is_between(starts, starts + rows.lengths, width)] = rows.tokens
    return filled

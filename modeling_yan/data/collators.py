"""Batches for the two stages: texts with their corruption for the autoencoder, sources and targets for the flow.

B: rows of the batch; L: width of an autoencoder batch; Ls, Lt: widths of the sources and of the targets.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import LongTensor
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that a loss leaves out
MAX_MASK_RATIO = 0.5  # up to here there is always a kept token for every span to stand before

Ids = list[int]
Batch = dict[str, LongTensor]


def mask_spans(
    input_ids: LongTensor,
    lengths: LongTensor,
    mask_ratio: float,
    max_span_len: int,
    mask_token_id: int,
    pad_token_id: int,
    generator: torch.Generator | None = None,
) -> LongTensor:
    """Text infilling: collapse random spans of each row into one mask token each, and close the row up to the left.

    Spans have 1 to `max_span_len` tokens (uniformly drawn, one of a row may be cut short) and never touch. A row of
    n tokens loses `mask_ratio` * n of them, rounded up or down at random, so that short rows lose as much on average.

    Args:
        input_ids: (B, L), valid on the left.
        lengths: (B,) numbers of valid tokens, 0 to L.
        mask_ratio: 0 to 0.5; at 0 the input is returned as it is.
        pad_token_id: what fills the rows up to L; may be the end-of-sequence token.
        generator: on the device of `input_ids`.

    Returns:
        (B, L) ids.
    """
    _check_masking(mask_ratio, max_span_len)
    if mask_ratio == 0:
        return input_ids
    gap_lengths = _draw_gaps(lengths, input_ids.shape[1], mask_ratio, max_span_len, generator)
    return _collapse(input_ids, lengths, gap_lengths, mask_token_id, pad_token_id)


def _check_masking(mask_ratio: float, max_span_len: int) -> None:
    if not 0 <= mask_ratio <= MAX_MASK_RATIO:
        raise ValueError(f"mask_ratio is {mask_ratio}, but must be from 0 to {MAX_MASK_RATIO}")
    if max_span_len < 1:
        raise ValueError(f"max_span_len is {max_span_len}, but must be at least 1")


def _draw_gaps(
    lengths: LongTensor, width: int, mask_ratio: float, max_span_len: int, generator: torch.Generator | None
) -> LongTensor:
    """(B, L + 1): how many tokens are hidden right before the kept token number 0, 1, ..., or after the last."""
    shape, options = (len(lengths), width + 1), {"generator": generator, "device": lengths.device}
    num_hidden = (mask_ratio * lengths + torch.rand(len(lengths), **options)).long()
    spans = _draw_spans(num_hidden, torch.randint(1, max_span_len + 1, shape, **options))
    # Deal the spans out to gaps in random order; spans of length 0 land in the rest, those out of range among them.
    num_kept = (lengths - num_hidden)[:, None]
    scores = torch.rand(shape, **options)
    out_of_range = torch.arange(width + 1, device=lengths.device) > num_kept
    order = scores.masked_fill(out_of_range, 2.0).argsort(dim=1)
    return torch.zeros_like(spans).scatter(1, order, spans)


def _draw_spans(num_hidden: LongTensor, proposed: LongTensor) -> LongTensor:
    """Cut the proposed lengths (B, n) off where their sum reaches (B,) `num_hidden`; zeros follow."""
    before = proposed.cumsum(1) - proposed
    return torch.minimum(proposed, (num_hidden[:, None] - before).clamp(min=0))


def _collapse(
    input_ids: LongTensor, lengths: LongTensor, gap_lengths: LongTensor, mask_token_id: int, pad_token_id: int
) -> LongTensor:
    """Rebuild the rows from their kept tokens (number j comes after the gap j) and one mask token for every span."""
    width = input_ids.shape[1]
    index = torch.arange(width + 1, device=input_ids.device)
    is_span = gap_lengths > 0
    taken_from = index + gap_lengths.cumsum(1)
    kept = input_ids.gather(1, taken_from.clamp(max=width - 1))
    is_kept = taken_from < lengths[:, None]
    moved_to = index + is_span.cumsum(1)

    # One spare column takes everything that is not there.
    rows = input_ids.new_full((len(input_ids), width + 1), pad_token_id)
    rows.scatter_(1, torch.where(is_kept, moved_to, width), kept)
    rows.scatter_(1, torch.where(is_span, moved_to - 1, width), torch.full_like(kept, mask_token_id))
    return rows[:, :width]


class SeededDraws:
    """A generator that gives equal draws for an equal seed, and different ones in every worker of a data loader."""

    def __init__(self, seed: int):
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self._worker_seed: int | None = None

    def __call__(self) -> torch.Generator:
        """The generator, seeded anew when this copy wakes up in a worker (workers begin as copies of each other)."""
        worker = get_worker_info()
        if worker is not None and worker.seed != self._worker_seed:
            self._worker_seed = worker.seed
            self.generator.manual_seed((self.seed + worker.seed) % 2**63)
        return self.generator


class AutoencoderCollator:
    """Rows -> corrupted `input_ids`, clean `labels` and `attention_mask` of ones, all (B, L), filled up with EOS.

    A row gives its `input_ids` or its `text`, of which `mask_ratio` is hidden; its fill is learned too. A pair gives
    its source, whole, and behind it its target, of which `target_mask_ratio` is hidden, so that the encoder learns to
    answer from the source. A source that begins with more mask tokens than the target has its answer slot there: the
    target, filled up with EOS, is learned in its place. Of a pair only the target and one EOS are learned, the rest is
    -100: copying the source would drown the few tokens of the answer in the mean loss. Strings may be token ids. From
    a text of more than `max_length` tokens a window is taken at random; a source keeps the end that fits. L is the
    longest row with one EOS, rounded up to a multiple of `multiple_of`, at most `max_length`, or always `max_length`
    if `fixed_width`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        mask_ratio: float = 0.15,
        max_span_len: int = 3,
        target_mask_ratio: float = 0.5,
        seed: int = 0,
        fixed_width: bool = False,
        multiple_of: int = 8,
    ):
        _check_masking(mask_ratio, max_span_len)
        _check_masking(target_mask_ratio, max_span_len)
        _check_length("max_length", max_length)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.mask_ratio = mask_ratio
        self.max_span_len = max_span_len
        self.target_mask_ratio = target_mask_ratio
        self.fixed_width = fixed_width
        self.multiple_of = multiple_of
        self.draws = SeededDraws(seed)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        generator, eos_token_id = self.draws(), self.tokenizer.eos_token_id
        texts = _to_ids(self.tokenizer, [_learned_text(row) for row in rows])
        texts = [_choose_window(ids, self.max_length, generator) for ids in texts]
        sources = _to_ids(self.tokenizer, [_entry(row, "source") if "target" in row else [] for row in rows])
        slots = [self._slot_length(source, text) for source, text in zip(sources, texts)]
        sources = [
            source[: self.max_length] if slot else _keep_end(source, self.max_length - len(text))
            for source, text, slot in zip(sources, texts, slots)
        ]
        corrupted = self._corrupt(texts, ["target" in row for row in rows], generator)
        for index, slot in enumerate(slots):
            if slot:
                source, text = sources[index], (texts[index] + [eos_token_id] * slot)[:slot]
                # read as a text that is hidden in the slot and followed by the rest of the source
                sources[index], texts[index], corrupted[index] = [], text + source[slot:], source

        whole = [source + text for source, text in zip(sources, texts)]
        width = self._width(whole)
        labels = _fill(whole, width, eos_token_id)
        for row, source, text, slot in zip(labels, sources, texts, slots):
            if source or slot:
                row[: len(source)] = IGNORED
                row[slot or len(source) + len(text) + 1 :] = IGNORED
        input_ids = _fill([(source + ids)[:width] for source, ids in zip(sources, corrupted)], width, eos_token_id)
        return {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(labels)}

    def _corrupt(self, texts: Sequence[Ids], is_target: Sequence[bool], generator: torch.Generator) -> list[Ids]:
        """Mask every text at the ratio of its kind; all come back as long as the longest, filled up with EOS."""
        lengths = torch.tensor([len(ids) for ids in texts])
        mask_token_id, eos_token_id = self.tokenizer.mask_token_id, self.tokenizer.eos_token_id
        clean = _fill(texts, int(lengths.max()), eos_token_id)
        as_text, as_target = (
            mask_spans(clean, lengths, ratio, self.max_span_len, mask_token_id, eos_token_id, generator)
            for ratio in (self.mask_ratio, self.target_mask_ratio)
        )
        return torch.where(torch.tensor(is_target)[:, None], as_target, as_text).tolist()

    def _slot_length(self, source: Ids, target: Ids) -> int:
        """Number of mask tokens that begin the source, if they are enough for the target and one EOS; else 0."""
        masks = next((i for i, token in enumerate(source) if token != self.tokenizer.mask_token_id), len(source))
        return masks if masks > len(target) else 0

    def _width(self, sequences: Sequence[Ids]) -> int:
        longest = max(len(ids) for ids in sequences)
        return self.max_length if self.fixed_width else _bucket(longest + 1, self.multiple_of, self.max_length)


class FlowCollator:
    """Rows of `source` and `target`, strings or token ids -> `input_ids`, `attention_mask` (B, Ls), `labels` (B, Lt).

    Sources are padded on the tokenizer's `padding_side`; one longer than `max_source_length` keeps its end, where the
    question is, and is counted in `num_truncated` (by each worker of a data loader for itself). An empty source
    becomes a single BOS. A target gets one EOS and then -100; one that does not fit into `canvas_length` with its EOS
    is cut and has none: its text goes on in the next canvas. Ls and Lt are those of the longest row, rounded up to a
    multiple of `multiple_of`, at most the two limits.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_source_length: int, canvas_length: int, multiple_of: int = 4
    ):
        _check_length("max_source_length", max_source_length)
        _check_length("canvas_length", canvas_length)
        self.tokenizer = tokenizer
        self.max_source_length = max_source_length
        self.canvas_length = canvas_length
        self.multiple_of = multiple_of
        self.num_truncated = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        sources = [self._cut_source(ids) for ids in _to_ids(self.tokenizer, [_entry(row, "source") for row in rows])]
        targets = [self._end_target(ids) for ids in _to_ids(self.tokenizer, [_entry(row, "target") for row in rows])]
        source_width = self._width(sources, self.max_source_length)
        left = self.tokenizer.padding_side == "left"
        return {
            "input_ids": _fill(sources, source_width, self.tokenizer.pad_token_id, left),
            "attention_mask": _fill([[1] * len(ids) for ids in sources], source_width, 0, left),
            "labels": _fill(targets, self._width(targets, self.canvas_length), IGNORED),
        }

    def _cut_source(self, ids: Ids) -> Ids:
        self.num_truncated += len(ids) > self.max_source_length
        return ids[-self.max_source_length :] or [self.tokenizer.bos_token_id]

    def _end_target(self, ids: Ids) -> Ids:
        return [*ids, self.tokenizer.eos_token_id][: self.canvas_length]

    def _width(self, sequences: Sequence[Ids], limit: int) -> int:
        return _bucket(max(len(ids) for ids in sequences), self.multiple_of, limit)


def _check_length(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}, but must be at least 1")


def _entry(row: Mapping[str, Any], key: str) -> str | Ids:
    if key not in row:
        raise ValueError(f'a row has the keys {sorted(row)}, but "{key}" is needed')
    return row[key]


def _learned_text(row: Mapping[str, Any]) -> str | Ids:
    """What the autoencoder learns to restore: the target of a pair, or the text."""
    if "target" in row:
        return row["target"]
    return row["input_ids"] if "input_ids" in row else _entry(row, "text")


def _keep_end(ids: Ids, num_tokens: int) -> Ids:
    return ids[max(0, len(ids) - num_tokens) :]


def _choose_window(ids: Ids, max_length: int, generator: torch.Generator) -> Ids:
    if len(ids) <= max_length:
        return ids
    start = int(torch.randint(len(ids) - max_length + 1, (), generator=generator))
    return ids[start : start + max_length]


def _to_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | Ids]) -> list[Ids]:
    """Encode the strings, in one call because that is faster; leave token ids as they are."""
    strings = [text for text in texts if isinstance(text, str)]
    encoded = iter(tokenizer(strings, add_special_tokens=False)["input_ids"] if strings else [])
    return [next(encoded) if isinstance(text, str) else list(text) for text in texts]


def _bucket(length: int, multiple_of: int, limit: int) -> int:
    return min(-(-length // multiple_of) * multiple_of, limit)


def _fill(sequences: Sequence[Ids], width: int, value: int, left: bool = False) -> LongTensor:
    """(B, width) with `value` after each sequence, or before it if `left`."""
    filled = torch.full((len(sequences), width), value)
    for row, ids in zip(filled, sequences):
        row[width - len(ids) if left else 0 :][: len(ids)] = torch.tensor(ids, dtype=torch.long)
    return filled

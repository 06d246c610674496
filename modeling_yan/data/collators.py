"""Batches for the two stages: texts with their corruption for the autoencoder, sources and targets for the flow.

B: rows of the batch; L: width of an autoencoder batch; Ls, Lt: widths of the sources and of the targets. No step
loops over tokens in Python: rows are cut one by one, everything after that works on whole batches.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import get_worker_info
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checks_yan import IGNORE_INDEX
from .canvases import GOES_ON
from .encoding import EncodedRow, Row, check_rows, encode_rows, entry
from .masking import (
    Ids,
    Ragged,
    check_length,
    check_masking,
    draw_spans,
    flatten,
    hide_spans,
    is_between,
    lengths_of,
    pad_rows,
)

logger = logging.get_logger(__name__)

Batch = dict[str, torch.Tensor]  # of torch.long
Array = npt.NDArray[Any]


class SeededDraws:
    """A generator that gives equal draws for an equal seed, and different ones in every worker of a data loader.

    Once it knows its epoch, the draws for a batch are a function of the seed, the epoch and the batch: a run that is
    resumed in the middle, where none of the batches before have been made, has those of an unbroken one.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.epoch: int | None = None
        self.generator = torch.Generator().manual_seed(seed)
        self._worker_seed: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Ids]]) -> torch.Generator:
        """The generator for a batch.

        A copy in a worker gets a new seed, because workers begin as copies of each other.
        """
        worker = get_worker_info()
        if self.epoch is not None:
            self.generator.manual_seed(_hash_batch(rows, f"{self.seed} {self.epoch}"))
        elif worker is not None and worker.seed != self._worker_seed:
            self._worker_seed = worker.seed
            self.generator.manual_seed((self.seed + worker.seed) % 2**63)
        return self.generator

    def __getstate__(self) -> dict[str, Any]:
        # As bytes: tensors and generators go to a spawned worker through shared memory, which can fail.
        return {**vars(self), "generator": self.generator.get_state().numpy().tobytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, generator=torch.Generator())
        self.generator.set_state(torch.frombuffer(bytearray(state["generator"]), dtype=torch.uint8))


def _hash_batch(rows: Sequence[Mapping[str, Ids]], salt: str) -> int:
    """A number that depends on the ids of the rows, and on their order."""
    digest = hashlib.blake2b(salt.encode(), digest_size=7)
    for row in rows:
        for name in ("input_ids", "source", "target"):
            if name in row:
                digest.update(f"{name} {len(row[name])}".encode() + np.asarray(row[name], np.int64).tobytes())
    return int.from_bytes(digest.digest(), "big")


class AutoencoderCollator:
    """Batches of stage one: corrupted `input_ids`, clean `labels` and an `attention_mask` of ones, int64 of (B, L).

    A row is a text (`text` or `input_ids`) or a pair (`source`, `target`). Instead of strings there may be token ids,
    as lists or arrays. Of a text, `mask_ratio` of the tokens are masked, and all labels count in the loss.

    Of a pair, the source is not masked, and `target_mask_ratio` of the target after it is masked. Labels outside the
    target and its EOS are -100, so that copying the source does not dominate the loss. If a source begins with enough
    mask tokens, the target has its labels there; `modeling_yan.data.encoding` has more forms. EOS pads every row to L:
    the longest row with one EOS, rounded up to a multiple of `multiple_of`.

    Of a longer text, a random window is taken. A longer source keeps its end, and a special token that the tokenizer
    puts before it; if it begins with mask tokens, its start. `num_truncated` counts both, separately in each worker of
    a data loader. Sources are encoded like prompts, with the tokenizer's special tokens, texts and targets without.

    Args:
        tokenizer: A tokenizer with a mask token and an EOS token.
        max_length: Largest L, in tokens; at least 1.
        mask_ratio: Share of a text's tokens to mask, in [0, 0.5].
        max_span_len: Longest masked span, in tokens; at least 1.
        target_mask_ratio: Share of the tokens of a pair's target to mask, in [0, 0.5].
        seed: Seed of the masks, in [-2^63, 2^63). After a call of `set_epoch`, which a Trainer makes, they depend on
            the epoch, too. A `generator` given to a call is used instead.
        fixed_width: Whether L is always `max_length`.
        multiple_of: L is rounded up to a multiple of it; at least 1.
        num_answer_slots: Mask tokens before the source of every pair, as in `YanConfig`; at least 0.
        copy_prompt_to_slots: Whether the slots hold the source's own first tokens instead, as in `YanConfig`.
        vertices_per_token: Number of slots for each token of the source or target, as in `YanConfig`; at least 1.

    Raises:
        ValueError: An argument out of its range, or a row without those keys.

    Example:

        >>> from transformers import AutoTokenizer
        >>> from modeling_yan.data import AutoencoderCollator
        >>> tokenizer = AutoTokenizer.from_pretrained("examples/checkpoints/yan-transformer-tiny")
        >>> batch = AutoencoderCollator(tokenizer, max_length=16)([{"text": "Anna has the hat."}])
        >>> batch["input_ids"].shape == batch["labels"].shape
        True
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
        num_answer_slots: int = 0,
        copy_prompt_to_slots: bool = False,
        vertices_per_token: int = 1,
    ):
        check_masking(mask_ratio, max_span_len)
        check_masking(target_mask_ratio, max_span_len)
        check_length("max_length", max_length)
        check_length("multiple_of", multiple_of)
        check_length("num_answer_slots", num_answer_slots, least=0)
        check_length("vertices_per_token", vertices_per_token)
        check_length("seed", seed, least=-(2**63))
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.mask_ratio = mask_ratio
        self.max_span_len = max_span_len
        self.target_mask_ratio = target_mask_ratio
        self.num_answer_slots = num_answer_slots
        self.copy_prompt_to_slots = copy_prompt_to_slots
        self.vertices_per_token = vertices_per_token
        self.fixed_width = fixed_width
        self.multiple_of = multiple_of
        self.draws = SeededDraws(seed)
        self.num_truncated = 0
        self._leading_ids = _leading_ids(tokenizer)

    def __call__(self, rows: Sequence[Row], generator: torch.Generator | None = None) -> Batch:
        encoded = [self._with_slots(row) for row in encode_rows(self.tokenizer, rows)]
        generator = self.draws(encoded) if generator is None else generator
        is_pair = np.array(["target" in row for row in encoded])
        texts = [row["target"] if "target" in row else row["input_ids"] for row in encoded]
        text = flatten(self._choose_windows(texts, generator))
        mask_ratio = np.where(is_pair, self.target_mask_ratio, self.mask_ratio)
        spans = draw_spans(text.lengths, mask_ratio, self.max_span_len, generator)
        shown = hide_spans(text, *spans, self.tokenizer.mask_token_id)
        if is_pair.any():
            input_ids, labels = self._add_sources(encoded, text, shown)
        else:
            width, eos_token_id = self._width(int(text.lengths.max())), self.tokenizer.eos_token_id
            input_ids, labels = pad_rows(shown, width, eos_token_id), pad_rows(text, width, eos_token_id)
        return _as_tensors(input_ids=input_ids, labels=labels, attention_mask=np.ones_like(labels))

    def set_epoch(self, epoch: int) -> None:
        """Let the draws be a function of the seed, the epoch and the batch alone."""
        self.draws.epoch = epoch

    def _with_slots(self, row: EncodedRow) -> EncodedRow:
        """The row with the model's own answer slot before its source, and a target no longer than that is."""
        number = self.num_answer_slots
        if not number or "target" not in row:
            return row
        source, limit = row["source"], max(self.max_length - number, 0)
        if len(source) > limit:
            self.num_truncated += 1
            source = _without_middle(source, limit, self._num_leading(source, limit))
        copied, target = (np.repeat(ids, self.vertices_per_token) for ids in (source, row["target"]))
        self.num_truncated += len(target) > number
        slots, target = copied[:number].tolist() if self.copy_prompt_to_slots else [], target[:number]
        slots += [self.tokenizer.mask_token_id] * (number - len(slots))
        return {"source": slots + list(source), "target": target, "answer_span": (0, number)}

    def _choose_windows(self, texts: Sequence[Ids], generator: torch.Generator) -> Sequence[Ids]:
        """At most `max_length` tokens of every text, from a random position."""
        if max(map(len, texts)) <= self.max_length:
            return texts
        excess = np.maximum(lengths_of(texts) - self.max_length, 0)
        self.num_truncated += int(np.count_nonzero(excess))
        starts = torch.rand(len(texts), generator=generator, dtype=torch.float64).numpy() * (excess + 1)
        return [ids[start : start + self.max_length] for ids, start in zip(texts, starts.astype(np.int64).tolist())]

    def _add_sources(self, rows: Sequence[EncodedRow], text: Ragged, shown: Ragged) -> tuple[Array, Array]:
        """`input_ids` and `labels` of a batch with pairs: its sources, its texts, and what is shown of those."""
        eos_token_id, lengths = self.tokenizer.eos_token_id, text.lengths
        slot_starts, slot_ends = self._slots(rows, lengths)
        loss_masks = [row.get("loss_mask", ()) for row in rows]
        is_in_place = (lengths_of(loss_masks) == lengths) & (lengths > 0)
        slot_starts, slot_ends = np.where(is_in_place, 0, slot_starts), np.where(is_in_place, lengths, slot_ends)
        has_slot = slot_ends > slot_starts
        source = flatten(self._cut_sources([row.get("source", []) for row in rows], lengths, has_slot))
        width = self._width(int((source.lengths + lengths * ~has_slot).max()))
        starts = np.where(has_slot, slot_starts, source.lengths)
        ends = np.where(source.lengths > 0, starts + lengths + 1, width)  # with one EOS, or with all of the fill
        ends = np.where(has_slot, slot_ends, ends)

        labels = pad_rows(text, width, eos_token_id, starts)
        labels[~is_between(starts, ends, width)] = IGNORE_INDEX
        input_ids = pad_rows(source, width, eos_token_id)
        is_text = is_between(starts, starts + shown.lengths, width) & ~has_slot[:, None]
        input_ids[is_text] = shown.tokens[np.repeat(~has_slot, shown.lengths)]
        if is_in_place.any():
            loss_mask = flatten([mask for mask, placed in zip(loss_masks, is_in_place.tolist()) if placed])
            labels[is_in_place] = np.where(pad_rows(loss_mask, width, 0), labels[is_in_place], IGNORE_INDEX)
        return input_ids, labels

    def _slots(self, rows: Sequence[EncodedRow], lengths: Array) -> tuple[Array, Array]:
        """(B,) start and end of every row's answer slot; equal if it has none, or too small a one for the text."""
        starts, ends = np.array([row.get("answer_span", (0, 0)) for row in rows]).T
        ends = np.minimum(ends, self.max_length)
        return starts, np.where(ends - starts >= lengths, ends, starts)

    def _cut_sources(self, sources: Sequence[Ids], lengths: Array, has_slot: Array) -> list[Ids]:
        """The part of every source that fits, beside its text unless that has its slot there."""
        given = lengths_of(sources)
        kept = np.minimum(given, self.max_length - lengths * ~has_slot)
        self.num_truncated += int(np.count_nonzero(given > kept))
        return [
            ids[:limit] if is_start else _without_middle(ids, limit, self._num_leading(ids, limit))
            for ids, limit, is_start in zip(sources, kept.tolist(), has_slot.tolist(), strict=True)
        ]

    def _num_leading(self, ids: Ids, limit: int) -> int:
        """1 if a source begins with a special token that stays where it is cut, 0 otherwise."""
        return int(limit > 1 and len(ids) > 0 and int(ids[0]) in self._leading_ids)

    def _width(self, longest: int) -> int:
        return self.max_length if self.fixed_width else _bucket(longest + 1, self.multiple_of, self.max_length)


class FlowCollator:
    """Rows of `source` and `target`, strings or token ids -> `input_ids`, `attention_mask` (B, Ls), `labels` (B, Lt).

    A source gets the special tokens that the tokenizer adds to a prompt, and padding on its `padding_side`. One longer
    than `max_source_length` keeps its end, where the question is, and mask tokens that it begins with; `num_truncated`
    counts it. An empty source becomes a single BOS. A target gets one EOS and then -100. One that does not fit into
    `canvas_length` with its EOS is cut and has none; `num_cut_targets` counts it. `split_targets` makes rows of all
    its canvases. The first row that is cut brings a warning. An empty target is its EOS alone, which teaches to
    generate nothing: `TaskSampler` leaves such rows out. Each worker of a data loader counts for itself. Ls and Lt are
    those of the longest row, rounded up to a multiple of `multiple_of`, at most the two limits.

    Args:
        tokenizer: Needs a pad token and an EOS token, and a BOS token for empty sources.
        max_source_length: Longest source Ls, in tokens; at least 1, the model's `max_prompt_length` if None.
        canvas_length: Longest target with its EOS, in tokens; at least 1, the model's if None.
        multiple_of: Widths are rounded up to a multiple of it; at least 1.
        model: A `YanForFlowGeneration`, whose config gives the two lengths.

    Raises:
        ValueError: A tokenizer without EOS or pad token; a row without source or target, or an empty source where the
            tokenizer has no BOS; a length that is missing, or beyond the model's.

    Example:

        >>> from transformers import AutoTokenizer
        >>> from modeling_yan.data import FlowCollator
        >>> tokenizer = AutoTokenizer.from_pretrained("examples/checkpoints/yan-transformer-tiny")
        >>> collator = FlowCollator(tokenizer, max_source_length=32, canvas_length=8)
        >>> collator([{"source": [5, 6, 7], "target": [8, 9]}])["labels"]
        tensor([[   8,    9,    2, -100]])
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_source_length: int | None = None,
        canvas_length: int | None = None,
        multiple_of: int = 4,
        model: PreTrainedModel | None = None,
    ):
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no EOS or no pad token: call prepare_tokenizer(tokenizer) first")
        limits = {"max_source_length": max_source_length, "canvas_length": canvas_length}
        check_length("multiple_of", multiple_of)
        self.tokenizer = tokenizer
        self.max_source_length, self.canvas_length = _checked_limits(limits, model)
        self.multiple_of = multiple_of
        self.num_truncated = 0
        self.num_cut_targets = 0
        self._leading_ids = _leading_ids(tokenizer)

    def __call__(self, rows: Sequence[Row]) -> Batch:
        check_rows(rows)
        for row in rows:
            entry(row, "source"), entry(row, "target")
        encoded = encode_rows(self.tokenizer, rows)
        source = flatten([self._cut_source(row["source"], row["answer_span"]) for row in encoded])
        source_width = _bucket(int(source.lengths.max()), self.multiple_of, self.max_source_length)
        starts = (
            source_width - source.lengths if self.tokenizer.padding_side == "left" else np.zeros_like(source.lengths)
        )
        return _as_tensors(
            input_ids=pad_rows(source, source_width, self.tokenizer.pad_token_id, starts),
            attention_mask=is_between(starts, starts + source.lengths, source_width).astype(np.int64),
            labels=self._end_targets([row["target"] for row in encoded], [row.get(GOES_ON, False) for row in rows]),
        )

    def _cut_source(self, ids: Ids, answer_span: tuple[int, int]) -> Ids:
        if not len(ids) and self.tokenizer.bos_token_id is None:
            raise ValueError("a source is empty and the tokenizer has no BOS to stand for it: see prepare_tokenizer")
        if not len(ids):
            return [self.tokenizer.bos_token_id]
        limit, excess = self.max_source_length, len(ids) - self.max_source_length
        if excess <= 0:
            return ids
        if not self.num_truncated:
            _warn_of_cut(f"a source of {len(ids)} tokens to max_source_length={limit}", "num_truncated")
        self.num_truncated += 1
        start, stop = answer_span
        if stop > start:  # a slot stays, and with it what stands before it
            stop = min(stop, limit)
        elif limit > 1 and int(ids[0]) in self._leading_ids:  # as where the tokenizer itself cuts on the left
            stop = 1
        return _without_middle(ids, limit, stop)

    def _end_targets(self, targets: Sequence[Ids], goes_on: Sequence[bool]) -> Array:
        target = flatten([ids[: self.canvas_length] for ids in targets])
        width = _bucket(int(target.lengths.max()) + 1, self.multiple_of, self.canvas_length)
        labels = pad_rows(target, width, IGNORE_INDEX)
        has_end = target.lengths < self.canvas_length
        if (has_end & goes_on).any():
            length = int(target.lengths[has_end & goes_on][0])
            needed = f"canvas_length={self.canvas_length}, as those of split_targets(rows, tokenizer, canvas_length)"
            raise ValueError(f"a target of {length} tokens that goes on in the next canvas: must have {needed}")
        is_cut = ~has_end & ~np.asarray(goes_on)
        if is_cut.any() and not self.num_cut_targets:
            longest = max(map(len, targets))
            limit = f"canvas_length={self.canvas_length}, of which an EOS takes one"
            _warn_of_cut(f"a target of {longest} tokens to {limit}", "num_cut_targets")
        self.num_cut_targets += int(np.count_nonzero(is_cut))
        labels[has_end, target.lengths[has_end]] = self.tokenizer.eos_token_id
        return labels


def _checked_limits(limits: dict[str, int | None], model: PreTrainedModel | None) -> list[int]:
    """The lengths, those of the model instead of None.

    Raises:
        ValueError: One is missing where there is no model, is below 1, or is more than the model can take.
    """
    longest: dict[str, int] = {}
    if model is not None:
        longest = {"max_source_length": model.config.max_prompt_length, "canvas_length": model.config.canvas_length}
    for name, length in limits.items():
        if length is not None and length > longest.get(name, length):
            raise ValueError(f"{name}={length}: must be at most {longest[name]}, which is what the model takes")
        check_length(name, longest.get(name) if length is None else length)
    return [longest[name] if length is None else length for name, length in limits.items()]


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special token, if any, that the tokenizer puts before every prompt, such as [CLS]."""
    return {tokenizer.cls_token_id, tokenizer.bos_token_id} & set(tokenizer("")["input_ids"][:1])


def _without_middle(ids: Ids, limit: int, num_kept: int) -> Ids:
    """At most `limit` ids: the first `num_kept` and the last ones."""
    excess = max(len(ids) - limit, 0)
    return [*ids[:num_kept], *ids[num_kept + excess :]] if excess else ids


def _as_tensors(**arrays: Array) -> Batch:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _warn_of_cut(what: str, counter: str) -> None:
    logger.warning(f"A row is too long: the collator cuts {what}. It counts such rows in {counter}.")


def _bucket(length: int, multiple_of: int, limit: int) -> int:
    return min(-(-length // multiple_of) * multiple_of, limit)

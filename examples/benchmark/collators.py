"""Tokens per second of the collators, beside a plain loop over rows and tokens that makes the same batches.

    python examples/benchmark/collators.py

Rows are tokenised before. Loop and collator take turns on one thread; the figures are medians, of processor time so
that other work on the machine counts less.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from modeling_yan.checks_yan import IGNORE_INDEX
from modeling_yan.data import AutoencoderCollator, FlowCollator

TOKENIZER = Path(__file__).parents[1] / "checkpoints" / "yan-transformer-tiny"
SIZES = ((32, 64), (64, 512), (256, 512))
MASK_RATIO, MAX_SPAN_LEN = 0.15, 3


def draw_spans(num_tokens, rng):
    """(first token, length) of every span to hide, in order; no two of them touch."""
    num_hidden = int(MASK_RATIO * num_tokens + rng.random())
    lengths = []
    while sum(lengths) < num_hidden:
        lengths.append(min(rng.randint(1, MAX_SPAN_LEN), num_hidden - sum(lengths)))
    gaps = sorted(rng.sample(range(num_tokens - num_hidden + 1), len(lengths)))
    rng.shuffle(lengths)
    starts = [gap + sum(lengths[:index]) for index, gap in enumerate(gaps)]
    return list(zip(starts, lengths))


def mask_row(ids, spans, mask_token_id):
    """The row with one mask token for every span."""
    masked, position = [], 0
    for start, length in spans:
        while position < start:
            masked.append(ids[position])
            position += 1
        masked.append(mask_token_id)
        position += length
    while position < len(ids):
        masked.append(ids[position])
        position += 1
    return masked


def infill_by_loop(rows, all_spans, width, mask_token_id, eos_token_id):
    """What `AutoencoderCollator` makes of rows of `input_ids`, token by token."""
    input_ids, labels = [], []
    for row, spans in zip(rows, all_spans):
        ids = list(row["input_ids"])
        masked = mask_row(ids, spans, mask_token_id)
        input_ids.append(masked + [eos_token_id] * (width - len(masked)))
        labels.append(ids + [eos_token_id] * (width - len(ids)))
    attention_mask = [[1] * width for _ in rows]
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
    return {name: torch.tensor(value) for name, value in batch.items()}


def pair_by_loop(rows, source_width, target_width, pad_token_id, eos_token_id):
    """What `FlowCollator` makes of rows of ids that fit, padded on the left, row by row."""
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        source, target = list(row["source"]), [*row["target"], eos_token_id]
        padding = source_width - len(source)
        batch["input_ids"].append([pad_token_id] * padding + source)
        batch["attention_mask"].append([0] * padding + [1] * len(source))
        batch["labels"].append(target + [IGNORE_INDEX] * (target_width - len(target)))
    return {name: torch.tensor(value) for name, value in batch.items()}


def round_up(length, multiple_of):
    return -(-length // multiple_of) * multiple_of


def infilling(tokenizer, num_rows, length, as_list, rng):
    """Loop and collator for span infilling, and the number of tokens in a batch."""
    rows = [{"input_ids": draw_ids(tokenizer, rng.randint(length // 2, length - 1), as_list)} for _ in range(num_rows)]
    collator = AutoencoderCollator(tokenizer, length, MASK_RATIO, MAX_SPAN_LEN)

    def loop():
        all_spans = [draw_spans(len(row["input_ids"]), rng) for row in rows]
        width = round_up(max(len(row["input_ids"]) for row in rows) + 1, 8)
        return infill_by_loop(rows, all_spans, width, tokenizer.mask_token_id, tokenizer.eos_token_id)

    return loop, lambda: collator(rows), sum(len(row["input_ids"]) for row in rows)


def pairs(tokenizer, num_rows, length, as_list, rng):
    """Loop and collator for sources and targets, and the number of tokens in a batch."""
    lengths = [(rng.randint(length // 2, length), rng.randint(length // 8, length // 4 - 1)) for _ in range(num_rows)]
    rows = [{"source": draw_ids(tokenizer, s, as_list), "target": draw_ids(tokenizer, t, as_list)} for s, t in lengths]
    collator = FlowCollator(tokenizer, length, length // 4)

    def loop():
        source_width = round_up(max(len(row["source"]) for row in rows), 4)
        target_width = round_up(max(len(row["target"]) for row in rows) + 1, 4)
        return pair_by_loop(rows, source_width, target_width, tokenizer.pad_token_id, tokenizer.eos_token_id)

    return loop, lambda: collator(rows), sum(map(sum, lengths))


def draw_ids(tokenizer, length, as_list):
    ids = np.random.default_rng(length).integers(10, len(tokenizer), length)
    return ids.tolist() if as_list else ids


def seconds_of(function):
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(loop, collate, repeats):
    """Median seconds of processor time of both, measured in turns."""
    times = [(seconds_of(loop), seconds_of(collate)) for _ in range(repeats + 1)][1:]
    return [statistics.median(column) for column in zip(*times)]


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Compare the collators with plain loops.")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--sizes", nargs="+", default=[f"{rows}x{length}" for rows, length in SIZES])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.padding_side = "left"
    print(f"{'batch':>10} {'ids':>6} {'rows x tokens':>13} {'loop':>12} {'collator':>12} tokens/s {'ratio':>7}")
    for make in (infilling, pairs):
        for kind in ("list", "array"):
            for size in options.sizes:
                num_rows, length = map(int, size.split("x"))
                loop, collate, num_tokens = make(tokenizer, num_rows, length, kind == "list", random.Random(0))
                slow, fast = (num_tokens / seconds for seconds in measure(loop, collate, options.repeats))
                print(f"{make.__name__:>10} {kind:>6} {size:>13} {slow:12,.0f} {fast:12,.0f} {fast / slow:16.3g}")


if __name__ == "__main__":
    main()

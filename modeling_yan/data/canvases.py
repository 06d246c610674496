"""Targets of several canvases, as rows of one canvas each.

`generate` goes on with a text that has no EOS yet: the next canvas sees the prompt and the canvases before it. Rows of
the same form teach a model to do so.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from .encoding import Row, check_rows, encode_rows
from .masking import check_length

GOES_ON = "goes_on"  # of a row whose target is followed by the next canvas, not by EOS


def count_canvases(row: Row, canvas_length: int) -> int:
    """How many canvases the target of a row of token ids takes, with its EOS.

    One whose target is the source with its masks replaced (`loss_mask`) has one: `generate` can't go on with it.
    """
    return 1 if "loss_mask" in row or "target" not in row else len(row["target"]) // canvas_length + 1


def canvas_of(row: Row, canvas_length: int, index: int) -> Row:
    """The row of token ids for canvas number `index` of its target."""
    number = count_canvases(row, canvas_length)
    if number == 1:
        return row
    start, target = index * canvas_length, np.asarray(row["target"])
    source = np.concatenate([np.asarray(row["source"], dtype=target.dtype), target[:start]])
    part = {"source": source, "target": target[start : start + canvas_length], GOES_ON: index < number - 1}
    return {**row, **part}


def split_targets(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, canvas_length: int) -> list[Row]:
    """Rows of `source` and `target`; of a target beyond one canvas, a row of token ids for every canvas.

    The source of a later canvas is the prompt and the target so far, with the special tokens that the tokenizer adds
    to a prompt after the prompt, as in `generate`. Other rows stay as they are.

    Args:
        rows: Pairs of strings or token ids. canvas_length: Tokens of a canvas, at least 1; an EOS takes one.

    Raises:
        ValueError: No rows, a row that is no pair, or a length below 1.

    Example:

        >>> from transformers import AutoTokenizer
        >>> from modeling_yan.data import split_targets
        >>> tokenizer = AutoTokenizer.from_pretrained("examples/checkpoints/yan-transformer-tiny")
        >>> rows = split_targets([{"source": [5, 6], "target": [7, 8, 9]}], tokenizer, canvas_length=2)
        >>> [(row["source"].tolist(), row["target"].tolist()) for row in rows]
        [([5, 6], [7, 8]), ([5, 6, 7, 8], [9])]
    """
    check_rows(rows)
    check_length("canvas_length", canvas_length)
    lacking = [row for row in rows if row.get("source") is None or row.get("target") is None]
    if lacking:
        raise ValueError(f"row {lacking[0]!r:.60}: must have source and target")
    parts: list[Row] = []
    for row, encoded in zip(rows, encode_rows(tokenizer, rows), strict=True):
        number = count_canvases(encoded, canvas_length)
        parts += [row] if number == 1 else [canvas_of(encoded, canvas_length, index) for index in range(number)]
    return parts

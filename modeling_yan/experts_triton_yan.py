"""The experts' heads on a GPU: two Triton kernels, in which every token meets its own head alone.

Letters: T tokens, K experts, D hidden size, F width of a head.

A program computes a tile of one head's layer for tokens that follow one another when they are sorted by expert. The
first layer fetches its tokens from where they are and the second puts them back there, so that nothing is sorted in
memory; weights are read where they lie. How many programs there are depends on T and K alone, so the kernels can be
recorded as a CUDA graph: those beyond the last tile do nothing.
"""

import math
from functools import cache

import torch
from transformers.utils import logging

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

logger = logging.get_logger(__name__)
FEWEST_ROWS, MOST_ROWS = 16, 128  # of a tile, half to all of what a head has on average: few of them are not full
MOST_COLUMNS, FEW_COLUMNS = 128, 64
INNER = 64  # products that are added up at a time


if triton is not None:
    # gelu(x) = x / (1 + 2^(x (a + b x^2))), the tanh form
    GELU_A = tl.constexpr(-2 * math.sqrt(2 / math.pi) / math.log(2))
    GELU_B = tl.constexpr(-2 * math.sqrt(2 / math.pi) / math.log(2) * 0.044715)

    @triton.jit
    def _layer_kernel(
        inputs_ptr, outputs_ptr, order_ptr, sizes_ptr, weight_ptr, bias_ptr, weight_offsets, bias_offsets,
        width_in, width_out,
        NUM_EXPERTS: tl.constexpr, IS_FIRST: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    ):  # fmt: skip
        """W x + b of each token's head, behind which the first of the two layers has its GELU.

        Head k has its weight (width_out, width_in) and its bias `offsets[k]` entries behind those of head 0.
        """
        tile = tl.program_id(0)
        first, last, weight_offset, bias_offset = tile * 0, tile * 0, tile.to(tl.int64) * 0, tile.to(tl.int64) * 0
        num_rows, num_tiles = tile * 0, tile * 0  # of the heads before
        for expert in tl.static_range(NUM_EXPERTS):
            size = tl.load(sizes_ptr + expert).to(tl.int32)
            place, tiles = tile - num_tiles, tl.cdiv(size, ROWS)
            is_here = (place >= 0) & (place < tiles)
            first = tl.where(is_here, num_rows + place * ROWS, first)
            last = tl.where(is_here, num_rows + size, last)
            weight_offset = tl.where(is_here, weight_offsets[expert], weight_offset)
            bias_offset = tl.where(is_here, bias_offsets[expert], bias_offset)
            num_rows += size
            num_tiles += tiles
        if first < last:
            rows, columns = first + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
            inner, is_row, is_column = tl.arange(0, INNER), rows < last, columns < width_out
            tokens = tl.load(order_ptr + rows, mask=is_row, other=0)
            read, write = (tokens, rows.to(tl.int64)) if IS_FIRST else (rows.to(tl.int64), tokens)
            inputs = inputs_ptr + read[:, None] * width_in + inner[None, :]
            weights = weight_ptr + weight_offset + columns[None, :].to(tl.int64) * width_in + inner[:, None]
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in tl.range(0, width_in, INNER):
                is_inner = start + inner < width_in
                x = tl.load(inputs + start, mask=is_row[:, None] & is_inner[None, :], other=0.0)
                w = tl.load(weights + start, mask=is_column[None, :] & is_inner[:, None], other=0.0)
                total = tl.dot(x, w, total)
            bias = tl.load(bias_ptr + bias_offset + columns, mask=is_column, other=0.0)
            result = total + bias[None, :].to(tl.float32)
            if IS_FIRST:
                result = result / (1 + tl.exp2(result * (GELU_A + GELU_B * result * result)))
            outputs = outputs_ptr + write[:, None] * width_out + columns[None, :]
            tl.store(outputs, result.to(outputs_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@cache
def has_kernels_for(device: torch.device) -> bool:
    """Whether it is a GPU whose matrix units know both 16-bit types, Ampere or later, for which Triton can compile."""
    if triton is None or device.type != "cuda" or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    row = torch.zeros(1, 16, dtype=torch.bfloat16, device=device)
    order = row.new_zeros(1, dtype=torch.long)
    try:
        triton_heads(row, order, order + 1, [row], [row[0, :1]], [row.T], [row[0]])
    except Exception as error:  # of many kinds: no compiler for C, no headers of Python, no room for its cache
        logger.warning_once(f"Triton cannot compile, so all experts are computed, which is slower: {error}")
        return False
    return True


def _offsets(tensors):
    """How many entries each of them lies behind the first."""
    return tuple((tensor.data_ptr() - tensors[0].data_ptr()) // tensor.itemsize for tensor in tensors)


def _layer(inputs, order, sizes, weights, biases, is_first: bool):
    weights, biases = ([tensor.contiguous() for tensor in tensors] for tensors in (weights, biases))
    width_out, width_in = weights[0].shape
    outputs = inputs.new_empty(len(inputs), width_out)
    rows = min(max(triton.next_power_of_2(len(inputs) // len(weights)) // 2, FEWEST_ROWS), MOST_ROWS)
    # the second layer is narrow, so that few tokens would not fill the GPU, and its products are long
    columns = MOST_COLUMNS if is_first or rows == MOST_ROWS else FEW_COLUMNS
    stages = 3 if rows == MOST_ROWS else 4 if is_first else 5  # at most 96 KB, which small GPUs have, too
    grid = triton.cdiv(len(inputs), rows) + len(weights) - 1, triton.cdiv(width_out, columns)
    _layer_kernel[grid](
        inputs, outputs, order, sizes, weights[0], biases[0], _offsets(weights), _offsets(biases), width_in, width_out,
        NUM_EXPERTS=len(weights), IS_FIRST=is_first,
        ROWS=rows, COLUMNS=columns, INNER=INNER, num_warps=8 if rows == MOST_ROWS else 4, num_stages=stages,
    )  # fmt: skip
    return outputs


def triton_heads(states, order, sizes, ups, up_biases, downs, down_biases) -> torch.Tensor:
    """Output (T, D) of each token's own head: W_down gelu(W_up x + b_up) + b_down, GELU in its tanh form.

    Args:
        states: (T, D), 16-bit: float32 tiles would not fit into registers. order, sizes: As in `YanTokenGroups`.
        ups, up_biases, downs, down_biases: Lists of K weights (F, D), biases (F,), weights (D, F) and biases (D,).
    """
    with torch.cuda.device_of(states):
        hidden = _layer(states.contiguous(), order, sizes, ups, up_biases, is_first=True)
        return _layer(hidden, order, sizes, downs, down_biases, is_first=False)

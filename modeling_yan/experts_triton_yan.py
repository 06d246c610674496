"""The experts' heads on a GPU: two Triton kernels, in which every token meets its own head alone.

Letters: T tokens, K experts, D hidden size, F width of a head.

A program computes a tile of one head's layer for tokens that follow one another when they are sorted by expert. The
first layer fetches its tokens from where they are and the second puts them back there, so that nothing is sorted in
memory. How many programs there are depends on T and K alone, so the kernels can be
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
        inputs_ptr, outputs_ptr, order_ptr, sizes_ptr, weight_ptr, bias_ptr, width_in, width_out,
        NUM_EXPERTS: tl.constexpr, IS_FIRST: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    ):  # fmt: skip
        """W x + b of each token's head, after which the first of the two layers has its GELU."""
        tile = tl.program_id(0)
        first, last, head = tile * 0, tile * 0, tile.to(tl.int64) * 0
        num_rows, num_tiles = tile * 0, tile * 0  # of the heads before
        for expert in tl.static_range(NUM_EXPERTS):
            size = tl.load(sizes_ptr + expert).to(tl.int32)
            place, tiles = tile - num_tiles, tl.cdiv(size, ROWS)
            is_here = (place >= 0) & (place < tiles)
            first = tl.where(is_here, num_rows + place * ROWS, first)
            last = tl.where(is_here, num_rows + size, last)
            head = tl.where(is_here, expert, head)
            num_rows += size
            num_tiles += tiles
        if first < last:
            rows, columns = first + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
            inner, is_row, is_column = tl.arange(0, INNER), rows < last, columns < width_out
            tokens = tl.load(order_ptr + rows, mask=is_row, other=0)
            read, write = (tokens, rows.to(tl.int64)) if IS_FIRST else (rows.to(tl.int64), tokens)
            inputs = inputs_ptr + read[:, None] * width_in + inner[None, :]
            weights = weight_ptr + (head * width_out + columns[None, :]) * width_in + inner[:, None]
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in tl.range(0, width_in, INNER):
                is_inner = start + inner < width_in
                x = tl.load(inputs + start, mask=is_row[:, None] & is_inner[None, :], other=0.0)
                w = tl.load(weights + start, mask=is_column[None, :] & is_inner[:, None], other=0.0)
                total = tl.dot(x, w, total)
            bias = tl.load(bias_ptr + head * width_out + columns, mask=is_column, other=0.0)
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
        triton_heads(row, order, order + 1, row[None], row[:, :1], row.T[None], row)
    except Exception as error:  # of many kinds: no compiler for C, no headers of Python, no room for its cache
        logger.warning_once(f"Triton cannot compile, so all experts are computed, which is slower: {error}")
        return False
    return True


def _layer(
    inputs: torch.Tensor,
    order: torch.Tensor,
    sizes: torch.Tensor,
    weights: torch.Tensor,
    biases: torch.Tensor,
    is_first: bool,
) -> torch.Tensor:
    num_heads, width_out, width_in = weights.shape
    outputs = inputs.new_empty(len(inputs), width_out)
    rows = min(max(triton.next_power_of_2(len(inputs) // num_heads) // 2, FEWEST_ROWS), MOST_ROWS)
    # the second layer is narrow, so that few tokens would not fill the GPU, and its products are long
    columns = MOST_COLUMNS if is_first or rows == MOST_ROWS else FEW_COLUMNS
    stages = 3 if rows == MOST_ROWS else 4 if is_first else 5  # at most 96 KB, which small GPUs have, too
    grid = triton.cdiv(len(inputs), rows) + num_heads - 1, triton.cdiv(width_out, columns)
    _layer_kernel[grid](
        inputs, outputs, order, sizes, weights.contiguous(), biases.contiguous(), width_in, width_out,
        NUM_EXPERTS=num_heads, IS_FIRST=is_first,
        ROWS=rows, COLUMNS=columns, INNER=INNER, num_warps=8 if rows == MOST_ROWS else 4, num_stages=stages,
    )  # fmt: skip
    return outputs


def triton_heads(
    tokens: torch.Tensor,
    order: torch.Tensor,
    sizes: torch.Tensor,
    up_proj: torch.Tensor,
    up_proj_bias: torch.Tensor,
    down_proj: torch.Tensor,
    down_proj_bias: torch.Tensor,
) -> torch.Tensor:
    """Output (T, D) of each token's own head: W_down gelu(W_up x + b_up) + b_down, GELU in its tanh form.

    Args:
        tokens: (T, D), 16-bit: float32 tiles would not fit into registers. order, sizes: As in `YanTokenGroups`.
        up_proj, up_proj_bias, down_proj, down_proj_bias: (K, F, D), (K, F), (K, D, F) and (K, D).
    """
    with torch.cuda.device_of(tokens):
        hidden = _layer(tokens.contiguous(), order, sizes, up_proj, up_proj_bias, is_first=True)
        return _layer(hidden, order, sizes, down_proj, down_proj_bias, is_first=False)

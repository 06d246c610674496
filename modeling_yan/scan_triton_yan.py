"""Mamba's selective scan as Triton kernels, for GPUs on which mamba-ssm is not installed (arXiv 2312.00752).

Letters: L length, K chunks of time, G scans run together, B batch, E inner width, N state size, C channels a program.

A program owns C channels of one row of one scan. It takes one step after the other, which is the least arithmetic. All
entries of the states (N, C) are in registers, and the next steps on their way from memory. Unless the rows alone
fill the GPU, every chunk of time is a program of its own, in three kernels: the states with which chunks end if they
begin with a state of zero; from these, one chunk after the other, the states before the chunks, called borders; and
the outputs of each chunk from its border.

The borders are all that is kept. The backward pass has the same three kernels: a chunk's share of the gradient of the
state before it is such a recurrence in reverse. The last of them needs a chunk's states in reverse order: it notes
down those before groups of a few steps, and computes one group's states at a time again.
"""

import math

import torch

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

HAS_TRITON = triton is not None
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
CHUNK_STEPS = 32  # of time
STATE_TILE = 32, 16  # channels of a program, and entries of the states of a thread
WALK_TILE = 64  # entries of the state of which one program walks over the chunks
GROUP_STEPS = 4  # states that the registers hold at once in the backward pass
FULL_GPU = 2048  # programs that fill a GPU without a division of time
FEW_CHUNKS = 2  # take less time one after the other than as three kernels


if triton is not None:
    LOG2_E = tl.constexpr(1 / math.log(2))
    STAGES = tl.constexpr(6)  # of loads: steps ahead and the present one

    @triton.jit
    def _state_tile(a_ptr, row, batch, inner, size, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr):
        """Channels (C,), entries (N,), positions in a state (N, C) and which exist, and A log2(e) (N, C)."""
        channels, entries = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, ENTRIES)
        places = entries[:, None] * inner + channels[None, :]
        is_state = (entries[:, None] < size) & (channels[None, :] < inner)
        a = tl.load(a_ptr + (row // batch) * size * inner + places, mask=is_state, other=0.0)
        return channels, entries, places, is_state, a * LOG2_E

    # Without the promise of aligned memory a thread is given all entries of one channel, of which y is a sum; with it
    # neighbouring channels, over which the backward pass adds up the gradients of b and c.
    @triton.jit(do_not_specialize_on_alignment=["values_ptr", "dt_ptr", "a_ptr", "ends_ptr", "totals_ptr"])
    def _ends_kernel(
        values_ptr, dt_ptr, a_ptr, maps_ptr, ends_ptr, totals_ptr, length, batch, inner, size, chunk,
        REVERSE: tl.constexpr, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """States (N, C) at a chunk's end from a state of zero, and its total dt (C,).

        `values` (L, E) and `maps` (L, N) are x and b; in reverse the gradient of y, and c, and the end is the start.
        """
        row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
        channels, entries, places, is_state, a = _state_tile(a_ptr, row, batch, inner, size, ENTRIES, CHANNELS)
        is_channel, is_entry = channels < inner, entries < size
        first = tl.program_id(2) * chunk
        num_steps = tl.minimum(chunk, length - first)
        place, direction = (first + (num_steps - 1 if REVERSE else 0)) * num_rows + row, -1 if REVERSE else 1
        wide, narrow = place * inner + channels, place * size + entries
        state, total = tl.zeros(places.shape, tl.float32), tl.zeros(channels.shape, tl.float32)
        for _ in tl.range(num_steps, num_stages=STAGES):
            dt = tl.load(dt_ptr + wide, mask=is_channel, other=0.0)
            value = tl.load(values_ptr + wide, mask=is_channel, other=0.0)
            maps = tl.load(maps_ptr + narrow, mask=is_entry, other=0.0)[:, None]
            decay = tl.exp2(dt[None, :] * a)
            if REVERSE:
                state = decay * (state + maps * value[None, :])
            else:
                state = decay * state + maps * (dt * value)[None, :]
            total += dt
            wide += direction * num_rows * inner
            narrow += direction * num_rows * size
        border = tl.program_id(2) * num_rows + row
        tl.store(ends_ptr + border * size * inner + places, state, mask=is_state)
        tl.store(totals_ptr + border * inner + channels, total, mask=is_channel)

    @triton.jit
    def _walk_kernel(
        ends_ptr, totals_ptr, a_ptr, borders_ptr, num_chunks, batch, inner, size,
        REVERSE: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """States before all chunks (after them in reverse), given with which they end from zero and their dt."""
        row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
        places = tl.program_id(1) * TILE + tl.arange(0, TILE)
        is_state = places < size * inner
        a = tl.load(a_ptr + (row // batch) * size * inner + places, mask=is_state, other=0.0) * LOG2_E
        state = tl.zeros(places.shape, tl.float32)
        for chunk in tl.range(num_chunks, num_stages=STAGES):
            border = (num_chunks - 1 - chunk if REVERSE else chunk) * num_rows + row
            end = tl.load(ends_ptr + border * size * inner + places, mask=is_state, other=0.0)
            total = tl.load(totals_ptr + border * inner + places % inner, mask=is_state, other=0.0)
            tl.store(borders_ptr + border * size * inner + places, state, mask=is_state)
            state = tl.exp2(total * a) * state + end

    @triton.jit(do_not_specialize_on_alignment=["x_ptr", "dt_ptr", "a_ptr", "y_ptr", "borders_ptr"])
    def _output_kernel(
        x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, y_ptr, borders_ptr, length, batch, inner, size, chunk,
        WALKS: tl.constexpr, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """y (L, C) of one chunk from its border, or of all of them, where it stores the borders itself."""
        row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
        channels, entries, places, is_state, a = _state_tile(a_ptr, row, batch, inner, size, ENTRIES, CHANNELS)
        is_channel, is_entry = channels < inner, entries < size
        first = tl.program_id(2) * chunk
        place, border = first * num_rows + row, (tl.program_id(2) * num_rows + row) * size * inner + places
        wide, narrow = place * inner + channels, place * size + entries
        if WALKS:
            state = tl.zeros(places.shape, tl.float32)
        else:
            state = tl.load(borders_ptr + border, mask=is_state, other=0.0)
        for start in range(first, length if WALKS else first + 1, chunk):
            if WALKS:
                tl.store(borders_ptr + border, state, mask=is_state)
                border += num_rows * size * inner
            for _ in tl.range(tl.minimum(chunk, length - start), num_stages=STAGES):
                dt = tl.load(dt_ptr + wide, mask=is_channel, other=0.0)
                inputs = dt * tl.load(x_ptr + wide, mask=is_channel, other=0.0)
                b = tl.load(b_ptr + narrow, mask=is_entry, other=0.0)[:, None]
                c = tl.load(c_ptr + narrow, mask=is_entry, other=0.0)[:, None]
                state = tl.exp2(dt[None, :] * a) * state + b * inputs[None, :]
                tl.store(y_ptr + wide, tl.sum(c * state, 0), mask=is_channel)
                wide += num_rows * inner
                narrow += num_rows * size

    @triton.jit
    def _exist(is_step, channels, inner, entries, size):
        """Which channels (C,) and entries (N,) of a step exist; none if there is no such step."""
        return channels < tl.where(is_step, inner, 0), entries < tl.where(is_step, size, 0)

    @triton.jit
    def _gradients_kernel(
        grad_y_ptr, x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, borders_ptr, grad_borders_ptr, kept_ptr,
        grad_x_ptr, grad_dt_ptr, grad_a_ptr, grad_b_ptr, grad_c_ptr, length, batch, inner, size, chunk,
        GROUP: tl.constexpr, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """All gradients of one chunk, from the state before it and the gradient of the state after it.

        States before groups of steps are kept in `kept`; those of one group at a time are computed again.
        """
        row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
        channels, entries, places, is_state, a = _state_tile(a_ptr, row, batch, inner, size, ENTRIES, CHANNELS)
        first = tl.program_id(2) * chunk
        num_steps = tl.minimum(chunk, length - first)
        num_groups = tl.cdiv(num_steps, GROUP)
        place, border = first * num_rows + row, (tl.program_id(2) * num_rows + row) * size * inner + places
        wide, narrow = place * inner + channels, place * size + entries
        wide_stride, narrow_stride, state_stride = num_rows * inner, num_rows * size, num_rows * size * inner
        kept_ptr += (tl.program_id(2) * tl.cdiv(chunk, GROUP) * num_rows + row) * size * inner
        part = tl.program_id(1).to(tl.int64) * length * num_rows * size  # blocks have their own grad_b, grad_c
        state = tl.load(borders_ptr + border, mask=is_state, other=0.0)
        for group in tl.range(num_groups, num_stages=2):
            tl.store(kept_ptr + group * state_stride + places, state, mask=is_state)
            for k in tl.static_range(GROUP):
                is_channel, is_entry = _exist(group * GROUP + k < num_steps, channels, inner, entries, size)
                dt = tl.load(dt_ptr + wide, mask=is_channel, other=0.0)  # 0 keeps the state
                inputs = dt * tl.load(x_ptr + wide, mask=is_channel, other=0.0)
                b = tl.load(b_ptr + narrow, mask=is_entry, other=0.0)[:, None]
                state = tl.exp2(dt[None, :] * a) * state + b * inputs[None, :]
                wide += wide_stride
                narrow += narrow_stride
        tl.debug_barrier()  # the states that were stored are read
        grad = tl.load(grad_borders_ptr + border, mask=is_state, other=0.0)
        grad_a = tl.zeros(places.shape, tl.float32)
        for groups_done in tl.range(num_groups, num_stages=2):
            group = num_groups - 1 - groups_done
            wide -= GROUP * wide_stride
            narrow -= GROUP * narrow_stride
            state = tl.load(kept_ptr + group * state_stride + places, mask=is_state, other=0.0)
            states = (state,)
            for k in tl.static_range(GROUP):
                is_channel, is_entry = _exist(group * GROUP + k < num_steps, channels, inner, entries, size)
                dt = tl.load(dt_ptr + wide + k * wide_stride, mask=is_channel, other=0.0)
                inputs = dt * tl.load(x_ptr + wide + k * wide_stride, mask=is_channel, other=0.0)
                b = tl.load(b_ptr + narrow + k * narrow_stride, mask=is_entry, other=0.0)[:, None]
                state = tl.exp2(dt[None, :] * a) * state + b * inputs[None, :]
                states += (state,)
            for k in tl.static_range(GROUP - 1, -1, -1):
                is_channel, is_entry = _exist(group * GROUP + k < num_steps, channels, inner, entries, size)
                wide_k, narrow_k = wide + k * wide_stride, narrow + k * narrow_stride
                dt = tl.load(dt_ptr + wide_k, mask=is_channel, other=0.0)
                x = tl.load(x_ptr + wide_k, mask=is_channel, other=0.0)
                grad_y = tl.load(grad_y_ptr + wide_k, mask=is_channel, other=0.0)[None, :]
                b = tl.load(b_ptr + narrow_k, mask=is_entry, other=0.0)[:, None]
                c = tl.load(c_ptr + narrow_k, mask=is_entry, other=0.0)[:, None]
                grad += c * grad_y
                tl.store(grad_c_ptr + part + narrow_k, tl.sum(states[k + 1] * grad_y, 1), mask=is_entry)
                tl.store(grad_b_ptr + part + narrow_k, tl.sum(grad * (dt * x)[None, :], 1), mask=is_entry)
                grad_inputs = tl.sum(grad * b, 0)
                grad *= tl.exp2(dt[None, :] * a)  # of the state before the step
                exponent = grad * states[k]  # gradient of dt A
                grad_a += exponent * dt[None, :]
                grad_dt = tl.sum(exponent * a, 0) / LOG2_E + grad_inputs * x
                tl.store(grad_x_ptr + wide_k, grad_inputs * dt, mask=is_channel)
                tl.store(grad_dt_ptr + wide_k, grad_dt, mask=is_channel)
        tl.store(grad_a_ptr + border, grad_a, mask=is_state)


def _borders(
    values: torch.Tensor, dt: torch.Tensor, a_matrix: torch.Tensor, maps: torch.Tensor, chunk: int, reverse: bool
) -> torch.Tensor:
    """States (K, G, B, N, E) before all chunks, or in reverse their gradients after all chunks.

    `values` and `maps` are x and b; in reverse the gradient of y, and c.
    """
    length, num_scans, batch, inner = values.shape
    size, num_chunks = maps.shape[-1], triton.cdiv(length, chunk)
    ends, borders = (values.new_empty(num_chunks, num_scans, batch, size, inner) for _ in range(2))
    totals = values.new_empty(num_chunks, num_scans, batch, inner)
    rows, (blocks, tile) = num_scans * batch, _launch(inner, size, *STATE_TILE)
    _ends_kernel[rows, blocks, num_chunks](
        values, dt, a_matrix, maps, ends, totals, length, batch, inner, size, chunk, REVERSE=reverse, **tile
    )
    _walk_kernel[rows, triton.cdiv(size * inner, WALK_TILE)](
        ends, totals, a_matrix, borders, num_chunks, batch, inner, size, REVERSE=reverse, TILE=WALK_TILE, num_warps=1
    )
    return borders


def _launch(inner: int, size: int, channels: int, entries_of_thread: int) -> tuple[int, dict[str, int]]:
    """The number of blocks of channels, and the sizes of a program's states (N, C)."""
    entries = triton.next_power_of_2(size)
    num_warps = max(1, entries * channels // (32 * entries_of_thread))
    return triton.cdiv(inner, channels), {"ENTRIES": entries, "CHANNELS": channels, "num_warps": num_warps}


def triton_scan(
    x: torch.Tensor, dt: torch.Tensor, a_matrix: torch.Tensor, b: torch.Tensor, c: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, shaped like x, and the states (K, G, B, N, E) before each chunk.

    Args:
        x, dt: (L, G, B, E). a_matrix: (G, N, E). b, c: (L, G, B, N). All float32 and contiguous.
        chunk: Steps between two states that are kept, at least 1; CHUNK_STEPS are a good number.
    """
    length, num_scans, batch, inner = x.shape
    y, size, num_chunks = torch.empty_like(x), b.shape[-1], triton.cdiv(length, chunk)
    rows, (blocks, tile) = num_scans * batch, _launch(inner, size, *STATE_TILE)
    walks = num_chunks <= FEW_CHUNKS or rows * blocks >= FULL_GPU
    with torch.cuda.device_of(x):
        if walks:
            borders = x.new_empty(num_chunks, num_scans, batch, size, inner)
        else:
            borders = _borders(x, dt, a_matrix, b, chunk, reverse=False)
        _output_kernel[rows, blocks, 1 if walks else num_chunks](
            x, dt, a_matrix, b, c, y, borders, length, batch, inner, size, chunk, WALKS=walks, **tile
        )
    return y, borders


def triton_scan_gradients(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    a_matrix: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    borders: torch.Tensor,
    chunk: int,
) -> Gradients:
    """Gradients of x, dt, a_matrix, b and c, given that of y; `borders` and `chunk` as of `triton_scan`.

    The sums over L, E and B are added up in a fixed order, so equal inputs give equal gradients.
    """
    length, _, batch, inner = x.shape
    blocks, tile = _launch(inner, b.shape[-1], *STATE_TILE)
    grad_x, grad_dt, grad_a = torch.empty_like(x), torch.empty_like(dt), torch.empty_like(borders)
    grad_b, grad_c = (x.new_empty(blocks, *b.shape) for _ in range(2))
    kept = x.new_empty(len(borders) * triton.cdiv(chunk, GROUP_STEPS), *borders.shape[1:])
    with torch.cuda.device_of(x):
        if len(borders) > 1:
            grad_borders = _borders(grad_y, dt, a_matrix, c, chunk, reverse=True)
        else:
            grad_borders = torch.zeros_like(borders)
        _gradients_kernel[x.shape[1] * batch, blocks, len(borders)](
            grad_y, x, dt, a_matrix, b, c, borders, grad_borders, kept, grad_x, grad_dt, grad_a, grad_b, grad_c,
            length, batch, inner, b.shape[-1], chunk, GROUP=GROUP_STEPS, **tile,
        )  # fmt: skip
    return grad_x, grad_dt, grad_a.sum((0, 2)), grad_b.sum(0), grad_c.sum(0)

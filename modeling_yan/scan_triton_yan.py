"""Mamba's selective scan as Triton kernels, for GPUs on which mamba-ssm is not installed (arXiv 2312.00752).

Letters: L length, K chunks of time, G scans run together, B batch, E inner width, N state size; in a program's tile
C channels, T steps and S segments.

Forward a program owns C channels of one row of one scan. It takes one step after the other, which is the least
arithmetic, with all N entries of the state in registers. Unless the rows alone fill the GPU, chunks of time are
programs, too, in three kernels: the states with which chunks end that begin with a state of zero; from these, one
chunk after the other, the states before the chunks (the borders); and the outputs of each chunk from its border.

The borders are all that is kept. The backward pass has the same three kernels: a chunk's share of the gradient of the
state before it is such a recurrence in reverse. Only the last one needs a chunk's states in reverse order, so it
takes the steps of a chunk at once, as a tile (T, S * C) in which a thread has all T steps of one segment of one
channel. For each entry of the state it scans the segments by themselves, then joins their ends.
"""

import math

import torch

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

TILE_STEPS = 64  # of a chunk
STATE_TILE = 512  # entries of the state in a program: 16 a thread
WALK_TILE = 32  # entries of the state of which one program walks over the chunks
GRADIENT_TILE = 8, 16  # segments and channels, of which there is one thread each
FULL_GPU = 2048  # programs that fill a GPU without a division of time
FEW_CHUNKS = 2  # take less time one after the other than as three kernels


if triton is not None:
    LOG2_E = tl.constexpr(1 / math.log(2))
    STAGES = tl.constexpr(4)  # steps that are loaded ahead

    @triton.jit
    def _state_tile(a_ptr, row, batch, inner, size, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr):
        """Channels (C,), entries (N,), places in a state (N, C) and which exist, and A log2(e) (N, C)."""
        channels, entries = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, ENTRIES)
        places = entries[:, None] * inner + channels[None, :]
        is_state = (entries[:, None] < size) & (channels[None, :] < inner)
        a = tl.load(a_ptr + (row // batch) * size * inner + places, mask=is_state, other=0.0)
        return channels, entries, places, is_state, a * LOG2_E

    # Without the promise of aligned memory a thread is given all entries of its channel, not neighbouring channels.
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
        start = tl.program_id(2) * chunk
        num_steps = tl.minimum(chunk, length - start)
        direction = -1 if REVERSE else 1
        place = (start + (num_steps - 1 if REVERSE else 0)) * num_rows + row
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
        direction = -1 if REVERSE else 1
        border = (num_chunks - 1 if REVERSE else 0) * num_rows + row
        states, channels = border * size * inner + places, border * inner + places % inner
        state = tl.zeros(places.shape, tl.float32)
        for _ in tl.range(num_chunks, num_stages=STAGES):
            end = tl.load(ends_ptr + states, mask=is_state, other=0.0)
            total = tl.load(totals_ptr + channels, mask=is_state, other=0.0)
            tl.store(borders_ptr + states, state, mask=is_state)
            state = tl.exp2(total * a) * state + end
            states += direction * num_rows * size * inner
            channels += direction * num_rows * inner

    @triton.jit(do_not_specialize_on_alignment=["x_ptr", "dt_ptr", "a_ptr", "y_ptr", "borders_ptr"])
    def _output_kernel(
        x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, y_ptr, borders_ptr, length, batch, inner, size, chunk,
        WALKS: tl.constexpr, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """y (L, C) of one chunk from its border, or of all of them, where it writes the borders itself."""
        row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
        channels, entries, places, is_state, a = _state_tile(a_ptr, row, batch, inner, size, ENTRIES, CHANNELS)
        is_channel, is_entry = channels < inner, entries < size
        first = tl.program_id(2) * chunk
        border = (tl.program_id(2) * num_rows + row) * size * inner + places
        wide = (first * num_rows + row) * inner + channels
        narrow = (first * num_rows + row) * size + entries
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
    def _join_before(
        decay, state, decay_before, state_before, next_decay, next_state, next_decay_before, next_state_before
    ):  # fmt: skip
        """Two runs of steps, each as the maps of a state h to decay h + state by all steps and by all but the last."""
        decay_before, state_before = decay * next_decay_before, next_decay_before * state + next_state_before
        return decay * next_decay, next_decay * state + next_state, decay_before, state_before

    @triton.jit
    def _last(tensor):
        """The last row (P,) of a tensor (T, P)."""
        rows = tl.arange(0, tensor.shape[0])[:, None]
        return tl.sum(tl.where(rows == tensor.shape[0] - 1, tensor, 0.0), 0)

    @triton.jit
    def _enter_segments(decay, inputs, state, SEGMENTS: tl.constexpr, REVERSE: tl.constexpr):
        """States (S * C,) before the segments, from their maps (S * C,) and the `state` (C,) before them all."""
        shape: tl.constexpr = SEGMENTS, state.shape[0]
        decay, inputs = decay.reshape(shape), inputs.reshape(shape)
        one, zero = tl.full(shape, 1.0, tl.float32), tl.zeros(shape, tl.float32)
        _, _, decay_before, before = tl.associative_scan((decay, inputs, one, zero), 0, _join_before, reverse=REVERSE)
        return (before + decay_before * state[None, :]).reshape(shape[0] * shape[1])

    @triton.jit
    def _to_channels(tensor, CHANNELS: tl.constexpr):
        """(T, S) as (T, S * C), the same for all channels of a segment."""
        shape: tl.constexpr = tensor.shape
        return tensor[:, :, None].broadcast_to(shape[0], shape[1], CHANNELS).reshape(shape[0], shape[1] * CHANNELS)

    @triton.jit
    def _to_segments(tensor, SEGMENTS: tl.constexpr):
        """(C,) as (1, S * C), the same for all segments."""
        channels: tl.constexpr = tensor.shape[0]
        return tensor[None, :].broadcast_to(SEGMENTS, channels).reshape(1, SEGMENTS * channels)

    @triton.jit
    def _tile(num_rows, inner, size, STEPS: tl.constexpr, SEGMENTS: tl.constexpr, CHANNELS: tl.constexpr):
        """Channels (C,), and steps, channels and places of a tile (T, S * C), steps and places of its maps (T, S)."""
        rows, columns = tl.arange(0, STEPS)[:, None], tl.arange(0, SEGMENTS * CHANNELS)[None, :]
        first = tl.program_id(1) * CHANNELS
        steps, tile_channels = rows + STEPS * (columns // CHANNELS), first + columns % CHANNELS
        map_steps = rows + STEPS * tl.arange(0, SEGMENTS)[None, :]
        places = steps * num_rows * inner + tile_channels
        return first + tl.arange(0, CHANNELS), steps, tile_channels, places, map_steps, map_steps * num_rows * size

    # Without the promise of aligned memory a thread is not given neighbouring channels, but the steps of its segment.
    @triton.jit(do_not_specialize_on_alignment=["grad_y_ptr", "x_ptr", "dt_ptr", "grad_x_ptr", "grad_dt_ptr"])
    def _gradients_kernel(
        grad_y_ptr, x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, borders_ptr, grad_borders_ptr,
        grad_x_ptr, grad_dt_ptr, grad_a_ptr, grad_b_ptr, grad_c_ptr, length, batch, inner, size, chunk,
        STEPS: tl.constexpr, SEGMENTS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """All gradients of one chunk, from the state before it and the gradient of the state after it."""
        row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
        channels, steps, tile_channels, tile, map_steps, map_tile = _tile(
            num_rows, inner, size, STEPS, SEGMENTS, CHANNELS
        )
        start = tl.program_id(2) * chunk
        num_steps = tl.minimum(chunk, length - start)
        is_channel = channels < inner
        is_inside, is_step = (steps < num_steps) & (tile_channels < inner), map_steps < num_steps
        place, border = start * num_rows + row, (tl.program_id(2) * num_rows + row) * size * inner
        a_ptr += (row // batch) * size * inner
        part = tl.program_id(1).to(tl.int64) * length * num_rows  # blocks of channels have their own grad_b, grad_c
        one, zero = tl.full(steps.shape, 1.0, tl.float32), tl.zeros(steps.shape, tl.float32)
        grad_y = tl.load(grad_y_ptr + place * inner + tile, mask=is_inside, other=0.0)
        dt = tl.load(dt_ptr + place * inner + tile, mask=is_inside, other=0.0)  # 0 keeps the state
        x = tl.load(x_ptr + place * inner + tile, mask=is_inside, other=0.0)
        grad_inputs, grad_dt = zero, zero
        for entry in range(size):
            maps, states = place * size + map_tile + entry, entry * inner + channels
            b = _to_channels(tl.load(b_ptr + maps, mask=is_step, other=0.0), CHANNELS)
            c = _to_channels(tl.load(c_ptr + maps, mask=is_step, other=0.0), CHANNELS)
            a = _to_segments(tl.load(a_ptr + states, mask=is_channel, other=0.0), SEGMENTS)
            state = tl.load(borders_ptr + border + states, mask=is_channel, other=0.0)
            grad_state = tl.load(grad_borders_ptr + border + states, mask=is_channel, other=0.0)
            decay, inputs = tl.exp2(dt * a * LOG2_E), b * (dt * x)
            whole_decay, whole, decay_before, before = tl.associative_scan((decay, inputs, one, zero), 0, _join_before)
            first = _enter_segments(_last(whole_decay), _last(whole), state, SEGMENTS, False)
            before = decay * (before + decay_before * first[None, :])  # decayed states before the steps
            # The scan back gives gradients of the states before steps; that after a step is the next one's.
            grads = c * grad_y
            whole_decay, whole, decay_before, after = tl.associative_scan(
                (tl.flip(decay, 0), tl.flip(decay * grads, 0), one, zero), 0, _join_before
            )
            first = _enter_segments(_last(whole_decay), _last(whole), grad_state, SEGMENTS, True)
            grads += tl.flip(after + decay_before * first[None, :], 0)
            exponent = grads * before  # gradient of dt A
            grad_inputs += b * grads
            grad_dt += exponent * a
            grad_a = tl.sum(tl.sum(exponent * dt, 0).reshape(SEGMENTS, CHANNELS), 0)
            grad_b = tl.sum((grads * (dt * x)).reshape(STEPS, SEGMENTS, CHANNELS), 2)
            grad_c = tl.sum(((before + inputs) * grad_y).reshape(STEPS, SEGMENTS, CHANNELS), 2)
            tl.store(grad_a_ptr + border + states, grad_a, mask=is_channel)
            tl.store(grad_b_ptr + part * size + maps, grad_b, mask=is_step)
            tl.store(grad_c_ptr + part * size + maps, grad_c, mask=is_step)
        tl.store(grad_x_ptr + place * inner + tile, grad_inputs * dt, mask=is_inside)
        tl.store(grad_dt_ptr + place * inner + tile, grad_dt + grad_inputs * x, mask=is_inside)


def _borders(values, dt, a_matrix, maps, chunk: int, reverse: bool) -> torch.Tensor:
    """States (K, G, B, N, E) before all chunks, or in reverse their gradients after all chunks.

    `values` and `maps` are x and b; in reverse the gradient of y, and c.
    """
    length, num_scans, batch, inner = values.shape
    size, num_chunks = maps.shape[-1], triton.cdiv(length, chunk)
    ends, borders = (values.new_empty(num_chunks, num_scans, batch, size, inner) for _ in range(2))
    totals = values.new_empty(num_chunks, num_scans, batch, inner)
    rows, (blocks, tile) = num_scans * batch, _state_launch(inner, size)
    _ends_kernel[rows, blocks, num_chunks](
        values, dt, a_matrix, maps, ends, totals, length, batch, inner, size, chunk, REVERSE=reverse, **tile
    )
    _walk_kernel[rows, triton.cdiv(size * inner, WALK_TILE)](
        ends, totals, a_matrix, borders, num_chunks, batch, inner, size, REVERSE=reverse, TILE=WALK_TILE, num_warps=1
    )
    return borders


def _state_launch(inner: int, size: int) -> tuple[int, dict[str, int]]:
    """The number of blocks of channels, and the sizes of a program's tile of states (N, C)."""
    entries = triton.next_power_of_2(size)
    channels = max(1, STATE_TILE // entries)
    return triton.cdiv(inner, channels), {"ENTRIES": entries, "CHANNELS": channels, "num_warps": 1}


def triton_scan(x, dt, a_matrix, b, c, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """y, shaped like x, and the states (K, G, B, N, E) before each chunk.

    Args:
        x, dt: (L, G, B, E). a_matrix: (G, N, E). b, c: (L, G, B, N). All float32 and contiguous.
        chunk: Steps between two states that are kept, at least 1; more than TILE_STEPS may not fit the registers.
    """
    length, num_scans, batch, inner = x.shape
    y, size, num_chunks = torch.empty_like(x), b.shape[-1], triton.cdiv(length, chunk)
    rows, (blocks, tile) = num_scans * batch, _state_launch(inner, size)
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


def triton_scan_gradients(grad_y, x, dt, a_matrix, b, c, borders, chunk: int) -> tuple[torch.Tensor, ...]:
    """Gradients of x, dt, a_matrix, b and c, given that of y; `borders` and `chunk` as of `triton_scan`.

    The sums over L, E and B are added up in a fixed order, so equal inputs give equal gradients.
    """
    length, _, batch, inner = x.shape
    segments, channels = GRADIENT_TILE
    steps, blocks = triton.next_power_of_2(triton.cdiv(chunk, segments)), triton.cdiv(inner, channels)
    grad_x, grad_dt, grad_a = torch.empty_like(x), torch.empty_like(dt), torch.empty_like(borders)
    grad_b, grad_c = (x.new_empty(blocks, *b.shape) for _ in range(2))
    with torch.cuda.device_of(x):
        if len(borders) > 1:
            grad_borders = _borders(grad_y, dt, a_matrix, c, chunk, reverse=True)
        else:
            grad_borders = torch.zeros_like(borders)
        _gradients_kernel[x.shape[1] * batch, blocks, len(borders)](
            grad_y, x, dt, a_matrix, b, c, borders, grad_borders, grad_x, grad_dt, grad_a, grad_b, grad_c,
            length, batch, inner, b.shape[-1], chunk,
            STEPS=steps, SEGMENTS=segments, CHANNELS=channels, num_warps=segments * channels // 32,
        )  # fmt: skip
    return grad_x, grad_dt, grad_a.sum((0, 2)), grad_b.sum(0), grad_c.sum(0)

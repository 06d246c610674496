"""Mamba's selective scan as two Triton kernels, for GPUs on which mamba-ssm is not installed (arXiv 2312.00752).

Letters: L length, G scans run together, B batch, E inner width, N state size; in a program's tile T steps, S segments
and C channels. One program owns C channels of one row of one scan and takes a chunk of time at once, as a tile
(T, S * C) in which a thread has all T steps of one segment of one channel. For each of the N entries of the state it
scans the segments by themselves, then joins their ends, and hands the entry on to the next chunk through the memory.
These states at the chunk borders are all that is kept: the backward pass computes one chunk's states again, and runs
the same scan backwards for their gradients.
"""

import math

import torch

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

TILE_STEPS = 64  # of all segments: a good chunk
FORWARD_TILE, BACKWARD_TILE = (4, 8), (8, 16)  # segments and channels, of which there is one thread each


if triton is not None:
    LOG2_E = tl.constexpr(1 / math.log(2))

    @triton.jit
    def _join(decay, state, next_decay, next_state):
        """One run of steps after another, each as the map of a state h to decay h + state."""
        return decay * next_decay, next_decay * state + next_state

    @triton.jit
    def _join_before(
        decay, state, decay_before, state_before, next_decay, next_state, next_decay_before, next_state_before
    ):  # fmt: skip
        """`_join` for runs that also keep the map of all their steps but the last."""
        decay_before, state_before = decay * next_decay_before, next_decay_before * state + next_state_before
        return decay * next_decay, next_decay * state + next_state, decay_before, state_before

    @triton.jit
    def _last(tensor, REVERSE: tl.constexpr):
        """The last row (P,) of a tensor (T, P), the first one in reverse."""
        rows = tl.arange(0, tensor.shape[0])[:, None]
        return tl.sum(tl.where(rows == (0 if REVERSE else tensor.shape[0] - 1), tensor, 0.0), 0)

    @triton.jit
    def _enter_segments(decay, inputs, state, SEGMENTS: tl.constexpr, REVERSE: tl.constexpr):
        """States (S * C,) before the segments, (C,) after the last, from their maps (S * C,) and the `state` (C,)."""
        shape: tl.constexpr = SEGMENTS, state.shape[0]
        decay, inputs = decay.reshape(shape), inputs.reshape(shape)
        one, zero = tl.full(shape, 1.0, tl.float32), tl.zeros(shape, tl.float32)
        decay, inputs, decay_before, before = tl.associative_scan(
            (decay, inputs, one, zero), 0, _join_before, reverse=REVERSE
        )
        before += decay_before * state[None, :]
        return before.reshape(shape[0] * shape[1]), _last(inputs + decay * state[None, :], REVERSE)

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
    @triton.jit(do_not_specialize_on_alignment=["x_ptr", "dt_ptr", "y_ptr"])
    def _forward_kernel(
        x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, y_ptr, borders_ptr, length, batch, inner, size, chunk,
        STEPS: tl.constexpr, SEGMENTS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
        channels, steps, tile_channels, tile, map_steps, map_tile = _tile(
            num_rows, inner, size, STEPS, SEGMENTS, CHANNELS
        )
        is_channel = channels < inner
        a_ptr += (row // batch) * size * inner
        border_ptr = borders_ptr + row * size * inner
        for entry in range(size):
            tl.store(border_ptr + entry * inner + channels, tl.zeros((CHANNELS,), tl.float32), mask=is_channel)
        for start in range(0, length, chunk):
            tl.debug_barrier()  # the states that were written are read
            next_ptr = border_ptr + num_rows.to(tl.int64) * size * inner
            num_steps = tl.minimum(chunk, length - start)
            is_inside, is_step = (steps < num_steps) & (tile_channels < inner), map_steps < num_steps
            place = start * num_rows + row
            dt = tl.load(dt_ptr + place * inner + tile, mask=is_inside, other=0.0)  # 0 keeps the state
            inputs = dt * tl.load(x_ptr + place * inner + tile, mask=is_inside, other=0.0)
            y = tl.zeros(inputs.shape, tl.float32)
            for entry in tl.range(size, num_stages=2):  # the next entry is loaded ahead
                b = tl.load(b_ptr + place * size + map_tile + entry, mask=is_step, other=0.0)
                c = tl.load(c_ptr + place * size + map_tile + entry, mask=is_step, other=0.0)
                a = tl.load(a_ptr + entry * inner + channels, mask=is_channel, other=0.0) * LOG2_E
                state = tl.load(border_ptr + entry * inner + channels, mask=is_channel, other=0.0)
                decay = tl.exp2(dt * _to_segments(a, SEGMENTS))
                decay, states = tl.associative_scan((decay, inputs * _to_channels(b, CHANNELS)), 0, _join)
                before, state = _enter_segments(_last(decay, False), _last(states, False), state, SEGMENTS, False)
                y += _to_channels(c, CHANNELS) * (states + decay * before[None, :])
                if start + chunk < length:
                    tl.store(next_ptr + entry * inner + channels, state, mask=is_channel)
            tl.store(y_ptr + place * inner + tile, y, mask=is_inside)
            border_ptr = next_ptr

    @triton.jit(do_not_specialize_on_alignment=["grad_y_ptr", "x_ptr", "dt_ptr", "grad_x_ptr", "grad_dt_ptr"])
    def _backward_kernel(
        grad_y_ptr, x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, borders_ptr, grad_state_ptr,
        grad_x_ptr, grad_dt_ptr, grad_a_ptr, grad_b_ptr, grad_c_ptr, length, batch, inner, size, chunk,
        STEPS: tl.constexpr, SEGMENTS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
        channels, steps, tile_channels, tile, map_steps, map_tile = _tile(
            num_rows, inner, size, STEPS, SEGMENTS, CHANNELS
        )
        is_channel = channels < inner
        a_ptr += (row // batch) * size * inner
        grad_state_ptr += row * size * inner
        grad_a_ptr += row * size * inner
        part = tl.program_id(1).to(tl.int64) * length * num_rows  # blocks of channels have their own grad_b, grad_c
        one, zero = tl.full(steps.shape, 1.0, tl.float32), tl.zeros(steps.shape, tl.float32)
        num_chunks = tl.cdiv(length, chunk)
        for chunks_done in range(num_chunks):
            tl.debug_barrier()  # the gradients that were written are read
            index = num_chunks - 1 - chunks_done
            start = index * chunk
            num_steps = tl.minimum(chunk, length - start)
            is_inside, is_step = (steps < num_steps) & (tile_channels < inner), map_steps < num_steps
            place, border = start * num_rows + row, (index * num_rows + row) * size * inner
            grad_y = tl.load(grad_y_ptr + place * inner + tile, mask=is_inside, other=0.0)
            dt = tl.load(dt_ptr + place * inner + tile, mask=is_inside, other=0.0)
            x = tl.load(x_ptr + place * inner + tile, mask=is_inside, other=0.0)
            grad_inputs, grad_dt = zero, zero
            for entry in range(size):
                maps, states = place * size + map_tile + entry, entry * inner + channels
                b = _to_channels(tl.load(b_ptr + maps, mask=is_step, other=0.0), CHANNELS)
                c = _to_channels(tl.load(c_ptr + maps, mask=is_step, other=0.0), CHANNELS)
                a = _to_segments(tl.load(a_ptr + states, mask=is_channel, other=0.0), SEGMENTS)
                state = tl.load(borders_ptr + border + states, mask=is_channel, other=0.0)
                grad_state = tl.load(grad_state_ptr + states, mask=is_channel, other=0.0)
                grad_a = tl.load(grad_a_ptr + states, mask=is_channel, other=0.0)
                decay, inputs = tl.exp2(dt * a * LOG2_E), b * (dt * x)
                whole_decay, whole, decay_before, before = tl.associative_scan(
                    (decay, inputs, one, zero), 0, _join_before
                )
                first, _ = _enter_segments(_last(whole_decay, False), _last(whole, False), state, SEGMENTS, False)
                before = decay * (before + decay_before * first[None, :])  # decayed states before the steps
                # The scan back gives gradients of the states before steps; that after a step is the next one's.
                grads = c * grad_y
                whole_decay, whole, decay_before, after = tl.associative_scan(
                    (tl.flip(decay, 0), tl.flip(decay * grads, 0), one, zero), 0, _join_before
                )
                first, grad_state = _enter_segments(
                    _last(whole_decay, False), _last(whole, False), grad_state, SEGMENTS, True
                )
                tl.store(grad_state_ptr + states, grad_state, mask=is_channel)
                grads += tl.flip(after + decay_before * first[None, :], 0)
                exponent = grads * before  # gradient of dt A
                grad_inputs += b * grads
                grad_dt += exponent * a
                grad_a += tl.sum(tl.sum(exponent * dt, 0).reshape(SEGMENTS, CHANNELS), 0)
                tl.store(grad_a_ptr + states, grad_a, mask=is_channel)
                grad_b = tl.sum((grads * (dt * x)).reshape(STEPS, SEGMENTS, CHANNELS), 2)
                grad_c = tl.sum(((before + inputs) * grad_y).reshape(STEPS, SEGMENTS, CHANNELS), 2)
                tl.store(grad_b_ptr + part * size + maps, grad_b, mask=is_step)
                tl.store(grad_c_ptr + part * size + maps, grad_c, mask=is_step)
            tl.store(grad_x_ptr + place * inner + tile, grad_inputs * dt, mask=is_inside)
            tl.store(grad_dt_ptr + place * inner + tile, grad_dt + grad_inputs * x, mask=is_inside)


def _launch(x: torch.Tensor, chunk: int, segments: int, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of programs for x (L, G, B, E), and the sizes of a program's tile."""
    steps = triton.next_power_of_2(triton.cdiv(chunk, segments))
    grid = x.shape[1] * x.shape[2], triton.cdiv(x.shape[-1], channels)
    return grid, {"STEPS": steps, "SEGMENTS": segments, "CHANNELS": channels, "num_warps": segments * channels // 32}


def triton_scan(x, dt, a_matrix, b, c, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """y, shaped like x, and the states (chunks, G, B, N, E) before each chunk.

    Args:
        x, dt: (L, G, B, E). a_matrix: (G, N, E). b, c: (L, G, B, N). All float32 and contiguous.
        chunk: Steps between two states that are kept, at least 1; more than TILE_STEPS may not fit the registers.
    """
    length, num_scans, batch, inner = x.shape
    y, size = torch.empty_like(x), b.shape[-1]
    borders = x.new_empty(triton.cdiv(length, chunk), num_scans, batch, size, inner)
    grid, tile = _launch(x, chunk, *FORWARD_TILE)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](x, dt, a_matrix, b, c, y, borders, length, batch, inner, size, chunk, **tile)
    return y, borders


def triton_scan_gradients(grad_y, x, dt, a_matrix, b, c, borders, chunk: int) -> tuple[torch.Tensor, ...]:
    """Gradients of x, dt, a_matrix, b and c, given that of y; `borders` and `chunk` as of `triton_scan`.

    The sums over E and B are added up in a fixed order, so equal inputs give equal gradients.
    """
    length, num_scans, batch, inner = x.shape
    size, (grid, tile) = b.shape[-1], _launch(x, chunk, *BACKWARD_TILE)
    grad_x, grad_dt = torch.empty_like(x), torch.empty_like(dt)
    grad_state, grad_a = (x.new_zeros(num_scans, batch, size, inner) for _ in range(2))
    grad_b, grad_c = (x.new_empty(grid[1], *b.shape) for _ in range(2))
    with torch.cuda.device_of(x):
        _backward_kernel[grid](
            grad_y, x, dt, a_matrix, b, c, borders, grad_state, grad_x, grad_dt, grad_a, grad_b, grad_c,
            length, batch, inner, size, chunk, **tile,
        )  # fmt: skip
    return grad_x, grad_dt, grad_a.sum(1), grad_b.sum(0), grad_c.sum(0)

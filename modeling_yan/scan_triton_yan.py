"""Mamba's selective scan as two Triton kernels, for GPUs on which mamba-ssm is not installed (arXiv 2312.00752).

Letters: L length, G scans run together, B batch, E inner width, N state size. One program owns a block of E of one
row of one scan and walks through time with the state in its registers, so the states never reach the memory; the
forward pass keeps those at the chunk borders, from which the backward pass computes one chunk's states again.
"""

import torch

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

BLOCK_ELEMENTS = 1024  # of a state's part in one program's registers


if triton is not None:

    @triton.jit
    def _step(x_ptr, dt_ptr, b_ptr, place, channels, is_channel, entries, is_entry, inner, size):
        """Input x (E,), step size (E,) and input map (N,) of the token at `place`."""
        x = tl.load(x_ptr + place * inner + channels, mask=is_channel, other=0.0)
        dt = tl.load(dt_ptr + place * inner + channels, mask=is_channel, other=0.0)
        return x, dt, tl.load(b_ptr + place * size + entries, mask=is_entry, other=0.0)

    @triton.jit
    def _forward_kernel(
        x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, y_ptr, borders_ptr, length, batch, inner, size, chunk,
        BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    ):  # fmt: skip
        row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
        entries, channels = tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
        is_entry, is_channel = entries < size, channels < inner
        tile, is_inside = entries[:, None] * inner + channels[None, :], is_entry[:, None] & is_channel[None, :]
        a = tl.load(a_ptr + (row // batch) * size * inner + tile, mask=is_inside, other=0.0)
        state = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        for step in range(length):
            if step % chunk == 0:
                border = (step // chunk) * num_rows + row
                tl.store(borders_ptr + border * size * inner + tile, state, mask=is_inside)
            place = step * num_rows + row
            x, dt, b = _step(x_ptr, dt_ptr, b_ptr, place, channels, is_channel, entries, is_entry, inner, size)
            c = tl.load(c_ptr + place * size + entries, mask=is_entry, other=0.0)
            state = tl.exp(dt[None, :] * a) * state + b[:, None] * (dt * x)[None, :]
            tl.store(y_ptr + place * inner + channels, tl.sum(c[:, None] * state, axis=0), mask=is_channel)

    @triton.jit
    def _backward_kernel(
        grad_y_ptr, x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, borders_ptr, states_ptr,
        grad_x_ptr, grad_dt_ptr, grad_a_ptr, grad_b_ptr, grad_c_ptr, length, batch, inner, size, chunk,
        BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    ):  # fmt: skip
        row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
        entries, channels = tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
        is_entry, is_channel = entries < size, channels < inner
        tile, is_inside = entries[:, None] * inner + channels[None, :], is_entry[:, None] & is_channel[None, :]
        a = tl.load(a_ptr + (row // batch) * size * inner + tile, mask=is_inside, other=0.0)
        grad_state, grad_a = tl.zeros((BLOCK_N, BLOCK_E), tl.float32), tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        num_chunks = tl.cdiv(length, chunk)
        for chunks_done in range(num_chunks):
            index = num_chunks - 1 - chunks_done
            start = index * chunk
            num_steps = tl.minimum(chunk, length - start)
            state = tl.load(borders_ptr + (index * num_rows + row) * size * inner + tile, mask=is_inside, other=0.0)
            for step in range(num_steps):  # the state before every step
                tl.store(states_ptr + (step * num_rows + row) * size * inner + tile, state, mask=is_inside)
                place = (start + step) * num_rows + row
                x, dt, b = _step(x_ptr, dt_ptr, b_ptr, place, channels, is_channel, entries, is_entry, inner, size)
                state = tl.exp(dt[None, :] * a) * state + b[:, None] * (dt * x)[None, :]
            tl.debug_barrier()  # the states that were written are read
            for steps_done in range(num_steps):
                step = num_steps - 1 - steps_done
                place = (start + step) * num_rows + row
                x, dt, b = _step(x_ptr, dt_ptr, b_ptr, place, channels, is_channel, entries, is_entry, inner, size)
                c = tl.load(c_ptr + place * size + entries, mask=is_entry, other=0.0)
                grad_y = tl.load(grad_y_ptr + place * inner + channels, mask=is_channel, other=0.0)
                before = tl.load(states_ptr + (step * num_rows + row) * size * inner + tile, mask=is_inside, other=0.0)
                decay = tl.exp(dt[None, :] * a)
                state = decay * before + b[:, None] * (dt * x)[None, :]
                grad_state += c[:, None] * grad_y[None, :]
                grad_inputs = tl.sum(b[:, None] * grad_state, axis=0)
                exponent = grad_state * decay * before  # gradient of dt A
                grad_a += exponent * dt[None, :]
                grad_dt = tl.sum(exponent * a, axis=0) + grad_inputs * x
                part = (tl.program_id(1) * length * num_rows + place) * size  # each block of channels has its own
                grad_b = tl.sum(grad_state * (dt * x)[None, :], axis=1)
                tl.store(grad_b_ptr + part + entries, grad_b, mask=is_entry)
                tl.store(grad_c_ptr + part + entries, tl.sum(state * grad_y[None, :], axis=1), mask=is_entry)
                tl.store(grad_x_ptr + place * inner + channels, grad_inputs * dt, mask=is_channel)
                tl.store(grad_dt_ptr + place * inner + channels, grad_dt, mask=is_channel)
                grad_state = decay * grad_state
            tl.debug_barrier()  # before the next chunk's states take their memory
        tl.store(grad_a_ptr + row * size * inner + tile, grad_a, mask=is_inside)


def _launch(x: torch.Tensor, size: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of programs for x (L, G, B, E) and a state size, and the sizes of a program's tile."""
    block_n = triton.next_power_of_2(size)
    block_e = min(triton.next_power_of_2(x.shape[-1]), max(16, BLOCK_ELEMENTS // block_n))
    return (x.shape[1] * x.shape[2], triton.cdiv(x.shape[-1], block_e)), {"BLOCK_N": block_n, "BLOCK_E": block_e}


def triton_scan(x, dt, a_matrix, b, c, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """y, shaped like x, and the states (chunks, G, B, N, E) before each chunk.

    Args:
        x, dt: (L, G, B, E). a_matrix: (G, N, E). b, c: (L, G, B, N). All float32 and contiguous.
        chunk: Steps between two states that are kept, at least 1.
    """
    length, num_scans, batch, inner = x.shape
    y, size = torch.empty_like(x), b.shape[-1]
    borders = x.new_empty(triton.cdiv(length, chunk), num_scans, batch, size, inner)
    grid, tile = _launch(x, size)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](x, dt, a_matrix, b, c, y, borders, length, batch, inner, size, chunk, **tile)
    return y, borders


def triton_scan_gradients(grad_y, x, dt, a_matrix, b, c, borders, chunk: int) -> tuple[torch.Tensor, ...]:
    """Gradients of x, dt, a_matrix, b and c, given that of y; `borders` and `chunk` as of `triton_scan`.

    The sums over E and B are added up in a fixed order, so equal inputs give equal gradients.
    """
    length, num_scans, batch, inner = x.shape
    size, (grid, tile) = b.shape[-1], _launch(x, b.shape[-1])
    grad_x, grad_dt = torch.empty_like(x), torch.empty_like(dt)
    grad_a = x.new_empty(num_scans, batch, size, inner)
    grad_b, grad_c = (x.new_empty(grid[1], *b.shape) for _ in range(2))
    states = x.new_empty(min(chunk, length), num_scans, batch, size, inner)
    with torch.cuda.device_of(x):
        _backward_kernel[grid](
            grad_y, x, dt, a_matrix, b, c, borders, states, grad_x, grad_dt, grad_a, grad_b, grad_c,
            length, batch, inner, size, chunk, **tile,
        )  # fmt: skip
    return grad_x, grad_dt, grad_a.sum(1), grad_b.sum(0), grad_c.sum(0)

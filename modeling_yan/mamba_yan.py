"""Bidirectional Mamba-1 mixer and its selective scan (Mamba: arXiv 2312.00752).

Letters: B batch, L length, D hidden size, E inner width, N state size, G scans run together (one a direction).

On a GPU mamba-ssm's kernel runs where it is installed, else Triton kernels of this package; elsewhere a scan in plain
PyTorch. All of them are linear in L, forward and backward.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .compilation_yan import is_bare, is_exporting, opaque_operator, use_custom_ops
from .configuration_yan import YanConfig
from .scan_triton_yan import CHUNK_STEPS, HAS_TRITON, triton_scan, triton_scan_gradients

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:
    selective_scan_fn = None

STEP_SIZES = 0.001, 0.1  # of a fresh model, evenly spread over their logarithm
SCAN_CHUNK_ELEMENTS = 2**19  # elements of one chunk's states; a few such buffers should fit the cache


def _scan(
    x: torch.Tensor, dt: torch.Tensor, a_matrix: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, shaped like x, and the states (chunks, G, B, N, E) before each chunk."""
    chunk = chunk_length(x, b.shape[-1])
    if x.is_cuda and HAS_TRITON:
        return triton_scan(x, dt, a_matrix, b, c, chunk)
    state = x.new_zeros(*x.shape[1:-1], b.shape[-1], x.shape[-1])
    y, borders = torch.empty_like(x), []
    for start in range(0, x.shape[0], chunk):
        part = slice(start, start + chunk)
        borders.append(state)
        _, states = _chunk_states(dt[part] * x[part], dt[part], a_matrix, b[part], state)
        y[part] = torch.matmul(c[part].unsqueeze(-2), states).squeeze(-2)
        state = states[-1].clone()
    return y, torch.stack(borders)


def _scan_gradients(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    a_matrix: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    borders: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, dt, a_matrix, b and c; recomputes one chunk's states at a time."""
    chunk = chunk_length(x, b.shape[-1])
    if x.is_cuda and HAS_TRITON:
        return triton_scan_gradients(grad_y.contiguous(), x, dt, a_matrix, b, c, borders, chunk)
    grad_x, grad_dt, grad_b, grad_c = (torch.empty_like(tensor) for tensor in (x, dt, b, c))
    grad_a, grad_state = torch.zeros_like(borders[0]), torch.zeros_like(borders[0])
    for index in reversed(range(len(borders))):
        part = slice(index * chunk, (index + 1) * chunk)
        inputs = dt[part] * x[part]
        decay, states = _chunk_states(inputs, dt[part], a_matrix, b[part], borders[index])
        grad_c[part] = torch.linalg.vecdot(states, grad_y[part].unsqueeze(-2))
        grads = c[part].unsqueeze(-1) * grad_y[part].unsqueeze(-2)
        grads[-1].add_(grad_state)
        steps, decays = grads.unbind()[::-1], decay.unbind()[::-1]
        for later, step, later_decay in zip(steps, steps[1:], decays):
            step.addcmul_(later_decay, later)
        grad_inputs = torch.matmul(b[part].unsqueeze(-2), grads).squeeze(-2)
        grad_b[part] = torch.linalg.vecdot(grads, inputs.unsqueeze(-2))
        grad_state = decay[0] * grads[0]
        # gradient of the exponent dt A: grads * decay * previous state, built in the decay's own memory
        exponent = decay.mul_(grads)
        exponent[1:].mul_(states[:-1])
        exponent[0].mul_(borders[index])
        grad_x[part] = grad_inputs * dt[part]
        grad_dt[part] = _weigh_states(exponent, a_matrix).add_(grad_inputs.mul_(x[part]))
        grad_a += exponent.mul_(dt[part].unsqueeze(-2)).sum(0)  # rows are added at the end: far from all at once
    return grad_x, grad_dt, grad_a.sum(1), grad_b, grad_c


def _weigh_states(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over N of states (T, G, B, N, E) times weights (G, N, E), without a product as large as the states."""
    total = states[..., 0, :] * weights[:, None, 0]
    for index in range(1, states.shape[-2]):
        total.addcmul_(states[..., index, :], weights[:, None, index])
    return total


class ChunkedSelectiveScan(torch.autograd.Function):
    """The recurrence h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t), y_t = C_t h_t, over chunks of time.

    Only h at the chunk borders is kept; the backward pass recomputes one chunk's states at a time. Inside a chunk
    everything but one fused multiply-add a step is vectorised over time. Tensors are time-major and float32:
    x, dt (L, G, B, E), a_matrix (G, N, E), b, c (L, G, B, N); the result is shaped like x.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        y, borders = _scan(*inputs)
        ctx.save_for_backward(*inputs, borders)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _scan_gradients(grad_y, *ctx.saved_tensors)


def _fake_scan(
    x: torch.Tensor, dt: torch.Tensor, a_matrix: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    num_chunks = -(-x.shape[0] // chunk_length(x, b.shape[-1]))
    return torch.empty_like(x), x.new_empty(num_chunks, *x.shape[1:-1], b.shape[-1], x.shape[-1])


# The same scan as one operator of a compiled graph, which would otherwise unroll it over time.
_scan_operator = opaque_operator(_scan, _fake_scan)
_gradients_operator = opaque_operator(
    _scan_gradients, lambda grad_y, *inputs: tuple(torch.empty_like(tensor) for tensor in inputs[:-1])
)
_scan_operator.register_autograd(
    lambda ctx, grad_y, _: _gradients_operator(grad_y.contiguous(), *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output[1]),
)


def chunk_length(x: torch.Tensor, state_size: int) -> int:
    """Time steps per chunk for x (L, G, B, E): a Triton chunk's, else what fits the cache, from 8 to L."""
    if x.is_cuda and HAS_TRITON:
        return CHUNK_STEPS
    return min(x.shape[0], max(8, SCAN_CHUNK_ELEMENTS // (x[0].numel() * state_size)))


def _chunk_states(
    inputs: torch.Tensor, dt: torch.Tensor, a_matrix: torch.Tensor, b: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decays exp(dt A) and states of one chunk, (T, G, B, N, E) each, from dt x and the state before it."""
    decay = (dt.unsqueeze(-2) * a_matrix.unsqueeze(1)).exp_()
    states = b.unsqueeze(-1) * inputs.unsqueeze(-2)
    # views made at once: indexing step by step costs as much as the product
    for step, step_decay in zip(states.unbind(), decay.unbind(), strict=True):
        state = step.addcmul_(step_decay, state)
    return decay, states


def selective_scan(
    x: torch.Tensor, dt: torch.Tensor, a_matrix: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """Run G selective scans with state zero at the start.

    Args:
        x, dt: Inputs and positive step sizes, (G, B, L, E). a_matrix: negative decay rates, (G, E, N).
        b, c: Input and output maps, (G, B, L, N).

    Returns:
        y (G, B, L, E) in the dtype of x; the state itself is always float32.
    """
    if selective_scan_fn is not None and x.is_cuda:
        return torch.stack([_kernel_scan(*scan) for scan in zip(x, dt, a_matrix, b, c, strict=True)])
    time_major = [tensor.float().permute(2, 0, 1, 3).contiguous() for tensor in (x, dt, b, c)]
    a_matrix = a_matrix.float().transpose(1, 2).contiguous()
    with torch.autocast(x.device.type, enabled=False):
        y = _scan_time_major(time_major[0], time_major[1], a_matrix, time_major[2], time_major[3])
    return y.permute(1, 2, 0, 3).to(x.dtype)


def _scan_time_major(*inputs: torch.Tensor) -> torch.Tensor:
    if is_exporting():
        return doubling_scan(*inputs)
    return _scan_operator(*inputs)[0] if use_custom_ops() else ChunkedSelectiveScan.apply(*inputs)


def doubling_scan(
    x: torch.Tensor, dt: torch.Tensor, a_matrix: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """The same scan as log2 L rounds over all steps at once, in torch's own operators; arguments as in `_scan`.

    In round r every state takes up the one 2^r steps before it. It is slower than the recurrence on a CPU and needs L
    times the state's memory. But it is a program of few operations, as an exported one has to be. Where L is left open
    there are rounds for the longest one that the program takes.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    decay = torch.exp(dt.unsqueeze(-2) * a_matrix.unsqueeze(1))
    states = b.unsqueeze(-1) * (dt * x).unsqueeze(-2)
    shift = 1
    while not statically_known_true(shift >= x.shape[0]):
        states = states + decay * _steps_before(states, shift)
        decay = decay * _steps_before(decay, shift)
        shift *= 2
    return torch.matmul(c.unsqueeze(-2), states).squeeze(-2)


def _steps_before(tensor: torch.Tensor, number: int) -> torch.Tensor:
    """What stands `number` steps earlier in a tensor (L, G, B, N, E), and zero where there is nothing."""
    return F.pad(tensor, (0, 0) * 4 + (number, 0))[: tensor.shape[0]]


def _kernel_scan(
    x: torch.Tensor, dt: torch.Tensor, a_matrix: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    x, dt, b, c = (tensor.transpose(1, 2).contiguous() for tensor in (x, dt, b, c))
    return selective_scan_fn(x, dt.to(x.dtype), a_matrix.float(), b.to(x.dtype), c.to(x.dtype)).transpose(1, 2)


class YanMamba(nn.Module):
    """One direction of a Mamba-1 mixer but for its scan, with the parameter names of transformers' `MambaMixer`."""

    def __init__(self, config: YanConfig) -> None:
        super().__init__()
        inner, rank = config.mamba_intermediate_size, config.time_step_rank
        self.config = config
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.conv_kernel, groups=inner, padding=config.conv_kernel - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * config.state_size, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, config.state_size))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The S4D-real initialisation of A and the step-size initialisation of arXiv 2312.00752, section 3.6."""
        config = self.config
        init.copy_(self.A_log, torch.arange(1.0, config.state_size + 1).log().expand_as(self.A_log))
        init.ones_(self.D)
        bound = config.time_step_rank**-0.5
        init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = (math.log(size) for size in STEP_SIZES)
        step = torch.empty(self.dt_proj.bias.shape).uniform_(low, high).exp()
        init.copy_(self.dt_proj.bias, step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        if self.conv1d.bias is not None:  # it has one, which its type does not say
            init.zeros_(self.conv1d.bias)
        init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))

    def forward(
        self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
        """What comes before the scan, from states (B, L, D); `padding_mask` (B, L) is 0 on padding at either end.

        Every weight is read in the call of its own module, here or in `output`: hooks fetch it for that alone.

        Returns:
            The arguments (x, dt, a_matrix, b, c) of one scan, its skip connection and its output gate, (B, L, E) both.
        """
        x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        # Padding is silenced twice: the convolution reads its neighbours, and its bias revives it afterwards.
        x = mask_padding(x, padding_mask)
        x = F.silu(self._convolve(x))
        x = mask_padding(x, padding_mask)
        sizes = [self.config.time_step_rank, self.config.state_size, self.config.state_size]
        rank_states, b, c = self.x_proj(x).split(sizes, dim=-1)
        dt = F.softplus(self.dt_proj(rank_states))
        return (x, dt, -torch.exp(self.A_log.float()), b, c), x * self.D.to(x.dtype), gate

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        """The causal convolution of x (B, L, E).

        As a sum of shifted copies it takes half the operator's time on a CPU, and a compiler merges it with what
        stands around. On a GPU without a compiler each copy would be a kernel of its own.
        """
        length = x.shape[1]
        if not is_bare(self.conv1d, nn.Conv1d) or (x.is_cuda and not use_custom_ops()):
            return self.conv1d(x.transpose(1, 2))[..., :length].transpose(1, 2)
        kernel = self.conv1d.weight.to(x.dtype).squeeze(1).t().contiguous()
        shifted = F.pad(x, (0, 0, len(kernel) - 1, 0))
        total = shifted[:, :length] * kernel[0]
        for k in range(1, len(kernel)):
            total = torch.addcmul(total, shifted[:, k : k + length], kernel[k])
        return total if self.conv1d.bias is None else total + self.conv1d.bias.to(x.dtype)

    def output(self, y: torch.Tensor, skip: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The scan's result y, with skip connection and gate (B, L, E), projected to (B, L, D)."""
        return self.out_proj((y + skip) * F.silu(gate))


def mask_padding(states: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """States (B, L, D) with zeros where `padding_mask` (B, L), if there is one, is 0."""
    return states if padding_mask is None else states * padding_mask.unsqueeze(-1).to(states.dtype)


class YanBidirectionalMamba(nn.Module):
    """A Mamba over the sequence and one over its reversal, concatenated and projected back to D."""

    def __init__(self, config: YanConfig) -> None:
        super().__init__()
        self.forward_mamba = YanMamba(config)
        self.backward_mamba = YanMamba(config)
        self.out_proj = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Mix `hidden_states` (B, L, D) both ways; `padding_mask` (B, L) is 0 on padding at either end."""
        reversed_mask = None if padding_mask is None else padding_mask.flip(1)
        ahead, skip_ahead, gate_ahead = self.forward_mamba(hidden_states, padding_mask)
        back, skip_back, gate_back = self.backward_mamba(hidden_states.flip(1), reversed_mask)
        y = selective_scan(*(torch.stack(pair) for pair in zip(ahead, back, strict=True)))
        out_ahead = self.forward_mamba.output(y[0], skip_ahead, gate_ahead)
        out_back = self.backward_mamba.output(y[1], skip_back, gate_back).flip(1)
        return self.out_proj(torch.cat([out_ahead, out_back], dim=-1))

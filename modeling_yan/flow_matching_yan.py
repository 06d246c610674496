"""Flow matching with a mixture of experts: path, likelihood and solver as functions that know no model.

Letters: B batch, L length, K experts, D latent dimensions. Times are in [0, 1]; 0 is noise, 1 is data.
Sources: flow matching (arXiv 2210.02747), rectified flow (2209.03003), MoE-FM (2604.15009, section 3), MMD training
(1505.03906).
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import Any, cast

import torch

from .compilation_yan import opaque_operator, use_custom_ops

MMD_BANDWIDTHS = (0.2, 0.5, 1.0, 2.0, 5.0)
MOST_LOGITS, MOST_LOGITS_CPU = 2**27, 2**16  # made float32 at once; on a CPU, as many as its cache holds


def interpolate(x_0: torch.Tensor, x_1: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The linear path x_t = (1 - t) x_0 + t x_1 for x_0, x_1 (B, L, D) and one time per row (B,)."""
    time = time.view(-1, *[1] * (x_0.dim() - 1)).to(x_0.dtype)
    return (1 - time) * x_0 + time * x_1


def hashed_uniform(
    seed: int, shape: tuple[int, ...], device: torch.device | None = None, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Uniform numbers in (0, 1), float32, that are a pure function of the seed and of each element's index.

    An element depends neither on the shape around it nor on device or library version: a row's noise is the same in
    every batch. Each axis is folded in by one round of a 32-bit integer hash. Integers `rows`, instead of the first
    axis' indices, make it a function of what they stand for, wherever in the batch that is.
    """
    compute = _hash_operator if use_custom_ops() else _hash_indices
    return compute(seed, list(shape), device, rows)


def _hash_indices(
    seed: int, shape: list[int], device: torch.device | None, rows: torch.Tensor | None = None
) -> torch.Tensor:
    state = torch.full([1] * len(shape), (seed + 0x9E3779B9) % 2**32, dtype=torch.int64, device=device)
    for axis, size in enumerate(shape):
        index = rows if axis == 0 and rows is not None else torch.arange(size, dtype=torch.int64, device=device)
        state = _hash32(_hash32(state) + index.view(-1, *[1] * (len(shape) - axis - 1)))
    return ((state >> 9).float() + 0.5) / 2**23


def hash_tokens(ids: torch.Tensor, positions: torch.Tensor, is_valid: torch.Tensor) -> torch.Tensor:
    """A 32-bit number (B,) for the valid ones of the token ids (B, L) at their positions (B or 1, L) of a text."""
    numbers = _hash32((positions.long() * 0x9E3779B1 + ids) & 0xFFFFFFFF)
    return numbers.masked_fill(~is_valid, 0).sum(1) & 0xFFFFFFFF


def _hash32(x: torch.Tensor) -> torch.Tensor:
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


# Opaque, because each round reads its input twice and inductor inlines it: 2^18 copies of the first one.
_hash_operator = opaque_operator(
    _hash_indices, lambda seed, shape, device, rows=None: torch.empty(shape, dtype=torch.float32, device=device)
)


def hashed_normal(
    seed: int, shape: tuple[int, ...], device: torch.device | None = None, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Standard normal numbers, float32, made from `hashed_uniform` by the inverse of the normal distribution."""
    return math.sqrt(2) * torch.erfinv(2 * hashed_uniform(seed, shape, device, rows) - 1)


def sample_times(batch_size: int, alpha: float, beta: float, device: torch.device | None = None) -> torch.Tensor:
    """Times (B,) from Beta(alpha, beta), alpha and beta > 0, drawn from the global random state."""
    if alpha == beta == 1:
        return torch.rand(batch_size, device=device)
    concentrations = torch.tensor([float(alpha), float(beta)], device=device)
    return torch.distributions.Beta(*concentrations).sample((batch_size,))


def _log_joint(
    target: torch.Tensor, velocities: torch.Tensor, gate_log_probs: torch.Tensor, sigma: float
) -> torch.Tensor:
    """log pi_k - |u* - u_k|^2 / (2 sigma^2), (B, L, K), in float32: the sum over D is large."""
    squared_distance = (target.float().unsqueeze(-2) - velocities.float()).square().sum(-1)
    return gate_log_probs.float() - squared_distance / (2 * sigma**2)


def mixture_nll(
    target: torch.Tensor,
    velocities: torch.Tensor,
    gate_log_probs: torch.Tensor,
    sigma: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of the target velocity under the experts' Gaussian mixture, per valid token.

    -log sum_k pi_k N(u*; u_k, sigma^2 I_D)   (arXiv 2604.15009, section 3)

    Args:
        target: u* (B, L, D). velocities: u_k (B, L, K, D). gate_log_probs: log pi_k (B, L, K). sigma: > 0.
        mask: (B, L), the tokens to average over; all if None.

    Returns:
        A float32 scalar. It grows with D: divide by D to compare widths.
    """
    return masked_mean(token_nll(target, velocities, gate_log_probs, sigma), mask)


def token_nll(
    target: torch.Tensor, velocities: torch.Tensor, gate_log_probs: torch.Tensor, sigma: float
) -> torch.Tensor:
    """The same for each token, (B, L)."""
    log_normaliser = 0.5 * target.shape[-1] * math.log(2 * math.pi * sigma**2)
    return log_normaliser - torch.logsumexp(_log_joint(target, velocities, gate_log_probs, sigma), dim=-1)


def as_one_token(
    target: torch.Tensor, velocities: torch.Tensor, gate_log_probs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A mixture over whole sequences as one over tokens of L D dimensions: (B, 1, L D), (B, 1, K, L D), (B, 1, K)."""
    return target.flatten(1).unsqueeze(1), velocities.transpose(1, 2).flatten(2).unsqueeze(1), gate_log_probs[:, :1]


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of `values` (B, L) over the tokens where `mask` (B, L) is 1; 0 where there is none."""
    if mask is None:
        return values.mean()
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def gate_entropy(gate_log_probs: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean entropy, in nats, of the gate's distributions; `gate_log_probs` (B, L, K)."""
    return masked_mean(-(gate_log_probs.exp() * gate_log_probs).sum(-1), mask)


def load_balance(gate_log_probs: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """KL(mean gate || uniform), in nats: 0 when all K experts are used equally; `gate_log_probs` (B, L, K)."""
    return _divergence(torch.stack([masked_mean(gate, mask) for gate in gate_log_probs.exp().unbind(-1)]))


def load_balance_of_rows(gate_log_probs: torch.Tensor) -> torch.Tensor:
    """The mean over the rows of what `load_balance` gives for each of them alone."""
    return _divergence(gate_log_probs.exp().mean(1)).mean()


def _divergence(usage: torch.Tensor) -> torch.Tensor:
    """KL(usage || uniform) of shares (..., K)."""
    return (usage * usage.clamp(min=1e-20).log()).sum(-1) + math.log(usage.shape[-1])


def gaussian_mmd(latents: torch.Tensor, max_samples: int = 2000, seed: int | None = None) -> torch.Tensor:
    """Squared maximum mean discrepancy between `latents` (N, D) and N(0, I), summed over five RBF kernels.

    Squared distances are divided by D, so that the bandwidths fit every width (arXiv 1505.03906). Uses at most
    `max_samples` rows, drawn from the global random state or, given a seed, the first ones and fixed noise.
    """
    if len(latents) > max_samples:
        latents = latents[torch.randperm(len(latents), device=latents.device) if seed is None else slice(None)]
    latents = latents[:max_samples].float()
    normal = torch.randn_like(latents) if seed is None else hashed_normal(seed, latents.shape, latents.device)
    return _mean_kernel(latents, latents) + _mean_kernel(normal, normal) - 2 * _mean_kernel(latents, normal)


def _mean_kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    squared = (a.square().sum(-1)[:, None] + b.square().sum(-1)[None] - 2 * a @ b.T).clamp(min=0) / a.shape[-1]
    return reduce(torch.add, (torch.exp(-squared / (2 * width**2)).mean() for width in MMD_BANDWIDTHS))


Velocity = Callable[[torch.Tensor, float], torch.Tensor]


def solver_times(num_steps: int) -> list[float]:
    """The times at which `solve_flow` evaluates the velocity, ascending."""
    return [step / num_steps for step in range(num_steps)]


def solve_flow(
    velocity: Velocity,
    x_0: torch.Tensor,
    num_steps: int,
    callback: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 0 to 1 in equal Euler steps and return x at t = 1.

    Args:
        velocity: Called once a step, with a point shaped like `x_0` and a time in [0, 1).
        x_0: Start point, any shape. num_steps: at least 1.
        callback: Called with the number of steps done and the point reached, after every step.

    Raises:
        ValueError: `num_steps` is not a positive integer.
    """
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1:
        raise ValueError(f"num_flow_steps={num_steps!r}: must be an integer of at least 1")
    x = x_0
    for step, time in enumerate(solver_times(num_steps)):
        x = x + ((step + 1) / num_steps - time) * velocity(x, time)
        if callback is not None:
            callback(step + 1, x)
    return x


def extrapolate(before: torch.Tensor, after: torch.Tensor, step: int, num_steps: int) -> torch.Tensor:
    """Where the velocity of Euler step number `step` of `num_steps`, from `before` to `after`, leads at t = 1."""
    return before + (after - before) * (num_steps - step + 1)


class TargetLogProbs(torch.autograd.Function):
    """`target_log_probs`, a part at a time: no float32 copy of all logits is made, or kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        most = MOST_LOGITS_CPU if logits.device.type == "cpu" else MOST_LOGITS
        ctx.num_tokens = max(1, most // logits.shape[-1])
        log_sums = torch.cat([part.float().logsumexp(-1, keepdim=True) for part in logits.split(ctx.num_tokens)])
        ctx.save_for_backward(logits, targets, log_sums)
        return logits.gather(-1, targets).float() - log_sums

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, log_sums = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        parts = (tensor.split(ctx.num_tokens) for tensor in (gradient, logits, targets, log_sums, *grads))
        for out, part, index, log_sum, grad in zip(*parts, strict=True):
            softmax = (part.float() - log_sum).exp_()
            out.copy_(softmax.mul_(-grad.sum(-1, keepdim=True)).scatter_add_(-1, index, grad))
        return gradient, None


def target_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (B, L, N) in float32 of N ids `targets` (B, L, N) at each position of `logits` (B, L, V)."""
    if torch.compiler.is_compiling():  # a compiler fuses it by itself
        return logits.float().log_softmax(-1).gather(-1, targets)
    found = TargetLogProbs.apply(logits.flatten(0, 1), targets.flatten(0, 1))
    return cast(torch.Tensor, found).view(targets.shape)


def token_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(y) (B, L) in float32 of each of the tokens `targets` (B, L) under `logits` (B, L, V)."""
    return target_log_probs(logits, targets.unsqueeze(-1)).squeeze(-1)


def token_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross-entropy of `logits` (B, L, V) against `targets` (B, L) over the tokens where `mask` is 1."""
    return masked_mean(-token_log_likelihood(logits, targets), mask)

"""Linear layers: how they start, and several of them in one product.

Letters of the shape comments: B batch, L sequence length, D hidden size.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .compilation_yan import is_bare, use_custom_ops
from .flow_matching_yan import hashed_normal


class YanMimeticLinear(nn.Linear):
    """A linear layer whose weights start as a fixed function of their shape and a seed: two of them start equal.

    As queries and keys they make a state attend first to what is like it, in token and in position. `logit` is the
    attention logit of a state of unit variance with itself: one number for all heads, or one for each half of them.
    (Mimetic initialisation, arXiv 2305.09828.)
    """

    def __init__(
        self, in_features: int, out_features: int, logit: float | tuple[float, float], seed: int | None = None
    ) -> None:
        super().__init__(in_features, out_features)
        self.logit, self.seed = logit, seed or 0

    @torch.no_grad()
    def reset_mimetic(self, num_heads: int) -> None:
        num_narrow = -(-num_heads // 2)
        first, second = self.logit if isinstance(self.logit, tuple) else (self.logit, self.logit)
        logits = torch.tensor([first] * num_narrow + [second] * (num_heads - num_narrow))
        head_dim = self.out_features // num_heads
        deviations = (logits / (self.in_features * math.sqrt(head_dim))).sqrt().repeat_interleave(head_dim)
        init.copy_(self.weight, deviations.unsqueeze(-1) * hashed_normal(self.seed, self.weight.shape))


class YanIdentityLinear(nn.Linear):
    """A square linear layer that starts as the identity."""

    @torch.no_grad()
    def reset_identity(self) -> None:
        init.copy_(self.weight, torch.eye(len(self.weight)))


class ZeroInitLinear(nn.Linear):
    """A linear layer that starts at zero."""


def joins_products(layers: Sequence[nn.Linear], states: torch.Tensor) -> bool:
    """Whether `linear_each` takes one product: in compiled generation on a GPU, where launches cost more than work."""
    if len(layers) < 2 or not states.is_cuda or not use_custom_ops() or torch.is_grad_enabled():
        return False
    return all(is_unmodified_linear(layer) and layer.weight.device == states.device for layer in layers)


def is_unmodified_linear(layer: nn.Module) -> bool:
    """Whether it is nothing but a product: not a layer with an adapter or a hook, or with a quantized weight."""
    return is_bare(layer, nn.Linear, YanMimeticLinear, YanIdentityLinear)


def dtype_of(layer: nn.Module) -> torch.dtype:
    """What a linear layer computes in: the type of its weight or, where that is quantized to integers, of its bias."""
    tensors = [tensor for tensor in (layer.weight, layer.bias) if torch.is_tensor(tensor)]  # methods in torch.ao
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def linear_each(layers: Sequence[nn.Linear], states: torch.Tensor) -> Sequence[torch.Tensor]:
    """Each layer's output for the same states (B, L, D).

    Joined products need joined weights, which are made in every generation. That costs less than it saves, and the
    weights stay where adapters, optimizers and checkpoints look for them.
    """
    if not joins_products(layers, states):
        return [layer(states) for layer in layers]
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    return F.linear(states, weight, bias).split([layer.out_features for layer in layers], dim=-1)

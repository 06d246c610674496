"""Experts and their gate: K heads on the trunk's state, of which a token needs one (arXiv 2604.15009).

Letters: B batch, L canvas length, D hidden size, K experts.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .layers_yan import YanFeedForward


class YanGate(nn.Module):
    """Which expert moves a token: an MLP on its trunk state, the mean of the prompt's latents, and the time."""

    def __init__(self, config):
        super().__init__()
        self.temperature = config.gate_temperature
        self.hidden_proj = nn.Linear(3 * config.hidden_size, config.hidden_size)
        self.expert_proj = nn.Linear(config.hidden_size, config.num_experts)

    def forward(self, states, prompt_mean, time_embedding):
        """log pi_k (B, L, K) in float32 from states (B, L, D), prompt_mean (B, D), time_embedding (B or 1, D)."""
        context = torch.cat([prompt_mean, time_embedding.expand_as(prompt_mean)], dim=-1)
        features = torch.cat([states, context.unsqueeze(1).expand(-1, states.shape[1], -1)], dim=-1)
        logits = self.expert_proj(F.gelu(self.hidden_proj(features)))
        return F.log_softmax(logits.float() / self.temperature, dim=-1)


class YanExperts(nn.Module):
    """K feed-forward heads on the trunk's state."""

    def __init__(self, config):
        super().__init__()
        self.heads = nn.ModuleList(YanFeedForward(config) for _ in range(config.num_experts))

    def forward(self, states):
        """Outputs of all heads, (B, L, K, D), from states (B, L, D)."""
        return torch.stack([head(states) for head in self.heads], dim=-2)

    def output_of(self, states, chosen):
        """Output (B, L, D) of each token's own head; `chosen` (B, L) holds indices. No other head is computed."""
        if len(self.heads) == 1:
            return self.heads[0](states)
        output = torch.zeros_like(states)
        for index, head in enumerate(self.heads):
            tokens = (chosen == index).nonzero(as_tuple=True)
            output = output.index_put(tokens, head(states[tokens]).to(output.dtype))  # autocast narrows heads
        return output

    def mixture_of(self, states, log_gate):
        """Gate-weighted mean output (B, L, D) of all heads."""
        return (self(states) * log_gate.exp().to(states.dtype).unsqueeze(-1)).sum(-2)


def _argmax(log_gate, uniform):
    return log_gate.argmax(-1)


def _sample(log_gate, uniform):
    """The Gumbel-max trick."""
    uniform = torch.rand_like(log_gate) if uniform is None else uniform
    return (log_gate - torch.log(-torch.log(uniform.clamp(min=1e-20)))).argmax(-1)


def _mixture(log_gate, uniform):
    return None


EXPERT_CHOICES = {"argmax": _argmax, "sample": _sample, "mixture": _mixture}


def choose_experts(log_gate: torch.Tensor, choice: str, uniform: torch.Tensor | None = None) -> torch.Tensor | None:
    """One expert per token, (B, L), from the gate (B, L, K); None for "mixture", which uses them all.

    "sample" draws from the global random state, or uses the numbers `uniform` (B or 1, L, K) in (0, 1).

    Raises:
        ValueError: `choice` is not a key of `EXPERT_CHOICES`.
    """
    if choice not in EXPERT_CHOICES:
        raise ValueError(f"expert_choice={choice!r}: must be one of {', '.join(EXPERT_CHOICES)}")
    return EXPERT_CHOICES[choice](log_gate, uniform)

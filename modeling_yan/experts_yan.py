"""Experts and their gate: K heads on the trunk's state, of which a token needs one (arXiv 2604.15009).

Letters: B batch, L canvas length, D hidden size, K experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_yan import YanConfig
from .expert_heads_yan import YanExpertHeads, YanTokenGroups


class YanGate(nn.Module):
    """Which expert moves a token: an MLP on its trunk state, the mean of the prompt's latents, and the time."""

    def __init__(self, config: YanConfig) -> None:
        super().__init__()
        self.temperature = config.gate_temperature
        self.hidden_proj = nn.Linear(3 * config.hidden_size, config.hidden_size)
        self.expert_proj = nn.Linear(config.hidden_size, config.num_experts)

    def forward(self, states: torch.Tensor, prompt_mean: torch.Tensor, time_embedding: torch.Tensor) -> torch.Tensor:
        """log pi_k (B, L, K) in float32 from states (B, L, D), prompt_mean (B, D), time_embedding (B or 1, D)."""
        context = torch.cat([prompt_mean, time_embedding.expand_as(prompt_mean)], dim=-1)
        features = torch.cat([states, context.unsqueeze(1).expand(-1, states.shape[1], -1)], dim=-1)
        logits = self.expert_proj(F.gelu(self.hidden_proj(features)))
        return F.log_softmax(logits.float() / self.temperature, dim=-1)


@dataclass
class YanExpertPrior:
    """What the gate says of the experts of a batch of texts, before they are seen.

    Args:
        scope: `expert_scope` of the config.
        gate_log_probs: log pi_k (B, L, K): of every token, or of every sequence (the same for all tokens).
    """

    scope: str
    gate_log_probs: torch.Tensor

    def log_evidence(self, log_likelihood: torch.Tensor) -> torch.Tensor:
        """log p(y) (B,) of texts, summed over all experts, from log p_k(y) (B, L, K) of their tokens."""
        if self.scope == "sequence":
            return (log_likelihood.sum(1) + self.gate_log_probs[:, 0]).logsumexp(-1)
        return (log_likelihood + self.gate_log_probs).logsumexp(-1).sum(1)

    def posterior(self, log_likelihood: torch.Tensor) -> "YanExpertPrior":
        """The same when the texts have been seen; argument as of `log_evidence`."""
        if self.scope == "sequence":
            log_likelihood = log_likelihood.sum(1, keepdim=True)
        return YanExpertPrior(self.scope, (log_likelihood + self.gate_log_probs).log_softmax(-1))

    def information(self, log_likelihood: torch.Tensor) -> torch.Tensor:
        """What the texts say of their experts (B,), nats: KL of the posterior from the prior.

        It is 0 where all experts would generate the same. Its mean over the model's own texts is the mutual
        information of expert and text, given the prompt. Argument as of `log_evidence`.
        """
        shares = self.posterior(log_likelihood).gate_log_probs.exp()
        return (shares * log_likelihood).sum((1, 2)) - self.log_evidence(log_likelihood)

    def choose(
        self, choice: str, uniform: torch.Tensor | None = None, ranks: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """One expert per token (B, L), or None for the "mixture".

        Args:
            choice, uniform, ranks: As in `choose_experts`; of a sequence those of its first token decide.
        """
        gate = self.gate_log_probs
        if choice == "mixture" or self.scope == "token":
            return choose_experts(gate, choice, uniform, ranks)
        chosen = choose_experts(gate[:, :1], choice, None if uniform is None else uniform[:, :1], ranks)
        return cast(torch.Tensor, chosen).expand(gate.shape[:2])

    def tempered(self, temperature: float) -> "YanExpertPrior":
        """The prior with its logits divided by a temperature of at least 0."""
        return YanExpertPrior(self.scope, (self.gate_log_probs / max(temperature, 1e-4)).log_softmax(-1))


@dataclass(frozen=True)
class YanExpertChoice:
    """How the experts of a solve are chosen.

    Args:
        name: "argmax", "sample", "mixture" or "ranked", of the gate. uniform, ranks: As in `choose_experts`.
        temperature: At which they are drawn.
        judge: A function that chooses in the gate's place: from what every expert predicts (B, L, K, D) and from
            their `YanExpertPrior`, to the experts (B, L).
    """

    name: str = "argmax"
    uniform: torch.Tensor | None = None
    ranks: torch.Tensor | None = None
    temperature: float = 1.0
    judge: Callable[[torch.Tensor, YanExpertPrior], torch.Tensor] | None = None

    def __call__(self, prior: YanExpertPrior, ends: torch.Tensor | None) -> tuple[YanExpertPrior, torch.Tensor | None]:
        """The prior that they were chosen from, and the experts (B, L); None for the "mixture"."""
        if self.temperature != 1:
            prior = prior.tempered(self.temperature)
        if self.judge is not None:
            return prior, self.judge(cast(torch.Tensor, ends), prior)
        return prior, prior.choose(self.name, self.uniform, self.ranks)


class YanExpertEmbedding(nn.Embedding):
    """What tells apart K experts that share one head, as large as the states that it is added to."""


class YanExperts(nn.Module):
    """K feed-forward heads on the trunk's state, or one head that is told which of K experts it is."""

    def __init__(self, config: YanConfig) -> None:
        super().__init__()
        num_heads = 1 if config.share_expert_head else config.num_experts
        self.heads, self.num_heads = YanExpertHeads(config, num_heads, config.expert_intermediate_size), num_heads
        is_told = config.share_expert_head and config.num_experts > 1
        self.embedding = YanExpertEmbedding(config.num_experts, config.hidden_size) if is_told else None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Outputs of all experts, (B, L, K, D), from states (B, L, D)."""
        if self.embedding is None:
            return self.heads(states)
        every = torch.arange(self.embedding.num_embeddings, device=states.device)
        return self.heads(states.unsqueeze(-2) + self.embedding(every)).squeeze(-2)

    def dispatch(self, chosen: torch.Tensor) -> YanTokenGroups:
        """The tokens of each expert as `chosen` (B, L), for any number of `combine`."""
        return YanTokenGroups(chosen, self.num_heads)

    def combine(self, states: torch.Tensor, groups: YanTokenGroups) -> torch.Tensor:
        """Output (B, L, D) of each token's own expert, computed as `config._experts_implementation` says."""
        if self.embedding is not None:
            states = states + self.embedding(groups.chosen)
        return self.heads(states, groups)

    def mixture_of(self, states: torch.Tensor, gate_log_probs: torch.Tensor) -> torch.Tensor:
        """Gate-weighted mean output (B, L, D) of all heads."""
        return (self(states) * gate_log_probs.exp().to(states.dtype).unsqueeze(-1)).sum(-2)


def _argmax(gate_log_probs: torch.Tensor, uniform: torch.Tensor | None, ranks: torch.Tensor | None) -> torch.Tensor:
    return gate_log_probs.argmax(-1)


def _ranked(gate_log_probs: torch.Tensor, uniform: torch.Tensor | None, ranks: torch.Tensor | None) -> torch.Tensor:
    """The most probable is of rank 0; of two that are equal, the first comes first, as with argmax."""
    order = gate_log_probs.argsort(dim=-1, descending=True, stable=True)
    ranks = cast(torch.Tensor, ranks)
    return order.gather(-1, ranks.expand(gate_log_probs.shape[:2]).unsqueeze(-1)).squeeze(-1)


def _sample(gate_log_probs: torch.Tensor, uniform: torch.Tensor | None, ranks: torch.Tensor | None) -> torch.Tensor:
    """The Gumbel-max trick."""
    uniform = torch.rand_like(gate_log_probs) if uniform is None else uniform
    return (gate_log_probs - torch.log(-torch.log(uniform.clamp(min=1e-20)))).argmax(-1)


def _mixture(gate_log_probs: torch.Tensor, uniform: torch.Tensor | None, ranks: torch.Tensor | None) -> None:
    return None


EXPERT_CHOICES = {"argmax": _argmax, "ranked": _ranked, "sample": _sample, "mixture": _mixture}


def choose_experts(
    gate_log_probs: torch.Tensor,
    choice: str,
    uniform: torch.Tensor | None = None,
    ranks: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """One expert per token, (B, L), from the gate (B, L, K); None for "mixture", which uses them all.

    Args:
        gate_log_probs: log pi_k (B, L, K). choice: A key of `EXPERT_CHOICES`.
        uniform: For "sample", numbers (B or 1, L, K) in (0, 1); of the global random state if None.
        ranks: For "ranked", the rank (B, 1) of each row's expert, 0 for the most probable one.

    Raises:
        ValueError: `choice` is not a key of `EXPERT_CHOICES`.
    """
    if choice not in EXPERT_CHOICES:
        raise ValueError(f"expert_choice={choice!r}: must be one of {', '.join(EXPERT_CHOICES)}")
    return EXPERT_CHOICES[choice](gate_log_probs, uniform, ranks)

"""The flow of YAN: a trunk that knows time and prompt, K velocity experts and their gate (arXiv 2604.15009).

Letters of the shape comments: B batch, S prompt length, L canvas length, D hidden size, K experts, T times.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .configuration_yan import YanConfig
from .expert_heads_yan import YanTokenGroups
from .experts_yan import YanExpertChoice, YanExpertPrior, YanExperts, YanGate
from .flow_matching_yan import solver_times
from .layers_yan import YanFlowLayer, YanTimeEmbedding, attention_mask_for
from .linear_yan import ZeroInitLinear, linear_each


@dataclass
class YanCondition:
    """What the flow needs of the prompt, computed once for all steps.

    Args:
        key_values: Keys and values (B, S, D) of the layers with cross-attention; None for the others.
        attention_mask: In the form of the attention implementation. mean: Mean latent of the valid tokens (B, D).
        draft: What the encoder has in the model's own answer slots (B, slots, D), if there are any.
    """

    key_values: list[tuple[torch.Tensor, torch.Tensor] | tuple[None, None]]
    attention_mask: torch.Tensor | None
    mean: torch.Tensor
    draft: torch.Tensor | None = None


@dataclass
class YanModulation:
    """Time embedding (T, D) and each flow layer's shifts and scales (T, num_modulations, D) at T times."""

    embedding: torch.Tensor
    layers: list[torch.Tensor]

    def __getitem__(self, index: slice) -> "YanModulation":
        return YanModulation(self.embedding[index], [layer[index] for layer in self.layers])


class YanTimeModulation(nn.Module):
    """Times to the shifts and scales of all flow layers, in one product for all layers and all times."""

    def __init__(self, config: YanConfig, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.time_embedding = YanTimeEmbedding(config)
        self.proj = ZeroInitLinear(config.hidden_size, sum(sizes) * config.hidden_size)

    def forward(self, times: torch.Tensor) -> YanModulation:
        embedding = self.time_embedding(times)
        modulations = self.proj(nn.functional.gelu(embedding)).unflatten(-1, (sum(self.sizes), -1))
        return YanModulation(embedding, list(modulations.split(self.sizes, dim=1)))


class YanFlow(nn.Module):
    """The expert vector fields: a trunk that knows time and prompt, K velocity heads, and a gate."""

    def __init__(self, config: YanConfig) -> None:
        super().__init__()
        self.config = config
        layers = [YanFlowLayer(config, index) for index in range(config.num_flow_layers)]
        self.layers = nn.ModuleList(layers)
        # Noise has standard deviation 1 and embeddings start at 0.02: unscaled, the positions would drown in it.
        self.position_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.modulation = YanTimeModulation(config, [layer.num_modulations for layer in layers])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.experts = YanExperts(config)
        self.gate = YanGate(config)

    def condition(
        self,
        latents: torch.Tensor,
        positions: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        canvas_length: int = 1,
        draft: torch.Tensor | None = None,
    ) -> YanCondition:
        """Prepare the encoded prompt for any number of velocity calls.

        The keys of the cross-attention see where a latent stands, its values only what it says.

        Args:
            latents: (B, S, D). positions: Position embeddings of the prompt's tokens (B or 1, S, D).
            attention_mask: (B, S), 0 on padding. draft: Latents of the answer slots, handed on.
        """
        canvas = latents[:, :1].expand(-1, canvas_length, -1)
        mask = attention_mask_for(self.config, canvas, attention_mask, latents)
        placed = latents + self.position_norm(positions)
        crossing: list[Any] = [layer.cross_attention for layer in self.layers if layer.has_cross_attention]
        keys = iter(linear_each([attention.k_proj for attention in crossing], placed))
        values = iter(linear_each([attention.v_proj for attention in crossing], latents))
        key_values = [
            (next(keys), next(values)) if layer.has_cross_attention else (None, None) for layer in self.layers
        ]
        if attention_mask is None:
            return YanCondition(key_values, mask, latents.mean(1), draft)
        valid = attention_mask.unsqueeze(-1).to(latents.dtype)
        return YanCondition(key_values, mask, (latents * valid).sum(1) / valid.sum(1).clamp(min=1), draft)

    def trunk(
        self, x: torch.Tensor, positions: torch.Tensor, modulation: YanModulation, condition: YanCondition
    ) -> torch.Tensor:
        """State (B, L, D) of the point x (B, L, D); `positions` (L, D) are the position embeddings of the canvas."""
        positions = self.position_norm(positions)
        states = self.add_draft(x + positions, condition)
        for layer, shifts_and_scales, key_value in zip(
            self.layers, modulation.layers, condition.key_values, strict=True
        ):
            states = layer(
                states, shifts_and_scales, positions, *key_value, cross_attention_mask=condition.attention_mask
            )
        return self.norm(states)

    def add_draft(self, latents: torch.Tensor, condition: YanCondition) -> torch.Tensor:
        """Latents (B, L, D), or (B, L, K, D) of all experts, plus the encoder's draft if that is what is refined."""
        if not self.config.refine_draft:
            return latents
        draft = cast(torch.Tensor, condition.draft)[:, : latents.shape[1]]
        return latents + (draft if latents.dim() == 3 else draft.unsqueeze(2))

    def velocities(self, states: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Velocities u_k (B, L, K, D) of all experts at the point x (B, L, D).

        A head predicts where its token goes, and x is subtracted: the trunk, no wider than the latents, would
        otherwise have to carry the noise through every layer beside everything else.

        Raises:
            ValueError: The flow refines a draft, and has velocities in `YanVelocity` alone.
        """
        if self.config.refine_draft:
            raise ValueError("refine_draft=True: must be False for velocities without a draft")
        return self.experts(states) - x.unsqueeze(-2)

    def gate_log_probs(self, states: torch.Tensor, modulation: YanModulation, condition: YanCondition) -> torch.Tensor:
        """log pi_k (B, L, K) from the trunk's states; the same for all tokens if a sequence has one expert."""
        if self.config.expert_scope != "sequence":
            return self.gate(states, condition.mean, modulation.embedding)
        gate_log_probs = self.gate(states.mean(1, keepdim=True), condition.mean, modulation.embedding)
        return gate_log_probs.expand(-1, states.shape[1], -1)

    def prior(self, states: torch.Tensor, modulation: YanModulation, condition: YanCondition) -> YanExpertPrior:
        """The gate of all tokens."""
        return YanExpertPrior(self.config.expert_scope, self.gate_log_probs(states, modulation, condition))


class YanVelocity:
    """Velocity field u(x, t) of one solve: every token is moved by the expert that was chosen for it at t = 0.

    The first call chooses, from the trunk pass that it makes anyway. Call with x (B, L, D) and one of the times of
    `solver_times(num_steps)`. Afterwards there are the experts (B, L), None for the "mixture", their `prior`,
    and `num_trunk_passes`.

    Args:
        positions: Position embeddings (L, D) of the canvas. condition: Of `YanFlow.condition`.
        num_steps: Of the solve. choice: How the experts are chosen.
    """

    def __init__(
        self,
        flow: YanFlow,
        positions: torch.Tensor,
        condition: YanCondition,
        num_steps: int,
        choice: YanExpertChoice,
    ) -> None:
        self.flow, self.positions, self.condition, self.choice = flow, positions, condition, choice
        times = solver_times(num_steps)
        self.index_of_time = {time: index for index, time in enumerate(times)}
        # made on the device: a copy from the host would keep CUDA graphs out
        self.modulation = flow.modulation(torch.arange(len(times), device=positions.device) / num_steps)
        self.prior: YanExpertPrior | None = None
        self.experts: torch.Tensor | None = None
        self.groups: YanTokenGroups | None = None
        self.num_trunk_passes = 0

    @property
    def gate_log_probs(self) -> torch.Tensor | None:
        """The gate (B, L, K) of every token independently, at t = 0; None before the first call."""
        return None if self.prior is None else self.prior.gate_log_probs

    def __call__(self, x: torch.Tensor, time: float) -> torch.Tensor:
        index = self.index_of_time[time]
        modulation = self.modulation[index : index + 1]
        states = self.flow.trunk(x, self.positions, modulation, self.condition)
        self.num_trunk_passes += 1
        predicted = self._choose(states, modulation) if self.prior is None else self._predict(states, self.prior)
        # a refined draft is where the path ends, which there is the rest of the time to reach
        return (predicted - x) / (1 - time) if self.flow.config.refine_draft else predicted - x

    def _predict(self, states: torch.Tensor, prior: YanExpertPrior) -> torch.Tensor:
        """What each token's own head predicts, (B, L, D)."""
        if self.groups is None:
            predicted = self.flow.experts.mixture_of(states, prior.gate_log_probs)
        else:
            predicted = self.flow.experts.combine(states, self.groups)
        return self.flow.add_draft(predicted, self.condition)

    def _choose(self, states: torch.Tensor, modulation: YanModulation) -> torch.Tensor:
        """Choose the experts of the whole solve; what they predict at t = 0."""
        predicted = None
        if self.choice.judge is not None:
            with torch.no_grad():  # the experts that are not chosen would have a backward pass for nothing
                predicted = self.flow.add_draft(self.flow.experts(states), self.condition)
        self.prior, self.experts = self.choice(self.flow.prior(states, modulation, self.condition), predicted)
        self.groups = None if self.experts is None else self.flow.experts.dispatch(self.experts)
        return self._predict(states, self.prior)

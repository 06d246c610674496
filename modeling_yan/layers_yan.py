"""Building blocks that encoder and flow share: positions, attention, feed-forward, time-conditioned norms.

Letters of the shape comments: B batch, L sequence length, S source length, D hidden size, H heads, T times.
"""

import math
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .checks_yan import can_look_at
from .compilation_yan import opaque_operator, select_rows, use_custom_ops
from .configuration_yan import YanConfig
from .linear_yan import (
    YanIdentityLinear,
    YanMimeticLinear,
    dtype_of,
    is_unmodified_linear,
    linear_each,
)
from .mamba_yan import YanBidirectionalMamba, mask_padding

SELF_LOGIT = 5.0  # soft: a token sees its neighbourhood and its equals
WIDE_LOGIT = 0.25  # almost none: a token sees the whole text
CROSS_LOGIT = 26.0  # sharp: a position of the canvas sees the same one of the prompt

Given = TypeVar("Given", torch.Tensor, torch.Tensor | None)


class YanEmbedding(nn.Embedding):
    """An embedding whose gradient is right where it is compiled, too."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return select_rows(self.weight, ids)


class YanPositionEmbedding(YanEmbedding):
    """Learned positions that start as sinusoids: attention to a fixed distance is then one rotation.

    Their frequencies are evenly spaced up to half a turn a token, so that one position is unlike all others.
    """

    @torch.no_grad()
    def reset_sinusoids(self, standard_deviation: float) -> None:
        num_frequencies = self.embedding_dim // 2
        frequencies = math.pi * torch.arange(1, num_frequencies + 1) / num_frequencies
        angles = torch.arange(self.num_embeddings)[:, None] * frequencies
        table = nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, self.embedding_dim % 2))
        init.copy_(self.weight, math.sqrt(2) * standard_deviation * table)


class YanEmbeddings(nn.Module):
    """Token and learned position embeddings; the flow uses the positions too.

    A pretrained encoder has its own token embeddings, and may lack a mask token for the answer slots.
    """

    word_embeddings: nn.Embedding
    answer_slots: nn.Embedding

    def __init__(self, config: YanConfig) -> None:
        super().__init__()
        if config.encoder is None:
            self.word_embeddings = YanEmbedding(config.vocab_size, config.hidden_size)
        elif config.num_answer_slots and config.mask_token_id is None:
            self.answer_slots = YanEmbedding(config.num_answer_slots, config.word_embedding_size)
        self.position_embeddings = YanPositionEmbedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        positions = self.position_embeddings(position_ids)
        return self.dropout(inputs_embeds.to(positions.dtype) + positions)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention over (B, H, L, D/H) tensors, in the form of transformers' attention interface."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def attention_mask_for(
    config: YanConfig, states: torch.Tensor, padding_mask: torch.Tensor | None, source: torch.Tensor | None = None
) -> torch.Tensor | None:
    """The mask of the attention of `states` (B, L, D) to `source` (B, S, D), or to themselves, in transformers' form.

    None where nothing is masked: a program of torch's compiler would get a mask that hides nothing, and with it an
    attention that is several kernels instead of one.
    """
    if padding_mask is None:
        return None
    return create_bidirectional_mask(config, states, padding_mask, encoder_hidden_states=source)


def count_positions(sequence: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Position ids (B, L), or (1, L) without a mask, of a sequence (B, L, ...).

    They count each row's valid tokens, so that padding on either side shifts nothing.
    """
    if attention_mask is None:
        return torch.arange(sequence.shape[1], device=sequence.device).unsqueeze(0)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def positions_from_start(valid: torch.Tensor) -> torch.Tensor:
    """Where each position (B, L) of a row goes if the valid ones move to the start, in order, the others after."""
    valid = valid.bool()
    behind = valid.sum(1, keepdim=True) + (~valid).cumsum(1)
    return torch.where(valid, valid.cumsum(1), behind) - 1


def select_positions(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The states (B, W, D) at the given positions (B, W) of states (B, L, D)."""
    first = states.shape[1] * torch.arange(len(states), device=states.device).unsqueeze(1)
    return select_rows(states.flatten(0, 1), first + positions)


def with_valid_first(attention_mask: torch.Tensor, *sequences: Given) -> list[Given]:
    """The mask (B, S) and sequences (B or 1, S, ...), if there, with every row's valid tokens moved to its start."""
    positions: torch.Tensor = positions_from_start(attention_mask)
    moved: list[Given] = [_move(sequence, positions) for sequence in sequences]
    moved.insert(0, _move(attention_mask, positions))
    return moved


def _move(sequence: Given, positions: torch.Tensor) -> Given:
    if sequence is None:
        return sequence
    sequence = sequence.expand(positions.shape[0], *sequence.shape[1:])
    index = positions.view(*positions.shape, *[1] * (sequence.dim() - 2)).expand(sequence.shape)
    return torch.zeros_like(sequence).scatter(1, index, sequence)


def sinusoid_angles(positions: torch.Tensor, num_frequencies: int, longest_period: float) -> torch.Tensor:
    """Angles (N, F) of positions (N,), with F frequencies from 1 down to almost 1 / longest_period, geometrically."""
    exponents = torch.arange(num_frequencies, device=positions.device, dtype=torch.float32) / num_frequencies
    return positions.float()[:, None] * torch.exp(-math.log(longest_period) * exponents)


class YanAttention(nn.Module):
    """Multi-head attention of a sequence to itself, or to another one whose keys and values are handed in."""

    def __init__(self, config: YanConfig, layer_idx: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False  # without it sdpa runs causally wherever the mask is None
        # half of the heads begin with what is near or alike, the others with the mean of the text
        logits = SELF_LOGIT, WIDE_LOGIT
        self.q_proj = YanMimeticLinear(config.hidden_size, config.hidden_size, logits, layer_idx)
        self.k_proj = YanMimeticLinear(config.hidden_size, config.hidden_size, logits, layer_idx)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        key_values: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attended states (B, L, D) and, with eager attention, the weights (B, H, L, S).

        `key_values` are two tensors (B, S, D) of another sequence.
        """
        if key_values is None:
            query, key, value = linear_each((self.q_proj, self.k_proj, self.v_proj), hidden_states)
        else:
            query, (key, value) = self.q_proj(hidden_states), key_values
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            *(self._split_heads(states) for states in (query, key, value)),
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        if attention_mask is None and can_look_at(query):
            output = _with_lost_rows(output, query, key)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


def _with_lost_rows(output: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The output (B, ...), NaN in rows whose queries or keys are: without a mask, torch's CPU kernel hides it."""
    if (query.sum() + key.sum()).isfinite():
        return output
    is_lost = query.flatten(1).sum(1).isnan() | key.flatten(1).sum(1).isnan()
    return output.masked_fill(is_lost.view(-1, *[1] * (output.dim() - 1)), torch.nan)


class YanCrossAttention(YanAttention):
    """Attention of the canvas to the prompt, which starts as a copy of it, position by position.

    Queries and keys see positions and start with equal weights, so that a canvas position first looks at the same
    position of the prompt; values are handed on as they are, because prompt and answer live in one latent space.
    """

    def __init__(self, config: YanConfig, layer_idx: int | None = None) -> None:
        super().__init__(config, layer_idx)
        self.q_proj = YanMimeticLinear(config.hidden_size, config.hidden_size, CROSS_LOGIT)
        self.k_proj = YanMimeticLinear(config.hidden_size, config.hidden_size, CROSS_LOGIT)
        self.v_proj = YanIdentityLinear(config.hidden_size, config.hidden_size)
        self.o_proj = YanIdentityLinear(config.hidden_size, config.hidden_size)


class YanShortConvolution(nn.Conv1d):
    """Adds to every token a depthwise convolution of its neighbourhood, of an odd number of tokens.

    A token then knows who stands beside it before attention compares it with others; attention alone takes long to
    find that out from positions (shift of H3, arXiv 2212.14052, section 3). Padding counts as nothing.
    """

    def __init__(self, hidden_size: int, kernel_size: int) -> None:
        super().__init__(
            hidden_size, hidden_size, kernel_size, padding=kernel_size // 2, groups=hidden_size, bias=False
        )

    def forward(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """States (B, L, D) to (B, L, D); `padding_mask` (B, L) is 0 on padding at either end."""
        visible = mask_padding(hidden_states, padding_mask)
        return hidden_states + super().forward(visible.transpose(1, 2)).transpose(1, 2)


class YanSelfAttentionMixer(nn.Module):
    """Self-attention under the common signature of the self-mixers, after a short convolution where configured."""

    def __init__(self, config: YanConfig, layer_idx: int | None = None) -> None:
        super().__init__()
        width = config.attention_conv_kernel
        self.convolution = YanShortConvolution(config.hidden_size, width) if width else None
        self.attention = YanAttention(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.convolution is not None:
            hidden_states = self.convolution(hidden_states, padding_mask)
        return self.attention(hidden_states, attention_mask, **kwargs)


class YanMambaMixer(nn.Module):
    """Bidirectional Mamba under the common signature of the self-mixers; it has no attention weights."""

    def __init__(self, config: YanConfig, layer_idx: int | None = None) -> None:
        super().__init__()
        self.mamba = YanBidirectionalMamba(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        return self.mamba(hidden_states, padding_mask), None


SELF_MIXERS = {"attention": YanSelfAttentionMixer, "mamba": YanMambaMixer}


def _gelu_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    rows = torch._addmm_activation(bias, states.flatten(0, -2), weight.T, use_gelu=True)
    return rows.view(*states.shape[:-1], -1)


_gelu_operator = opaque_operator(
    _gelu_linear, lambda states, weight, bias: states.new_empty(*states.shape[:-1], weight.shape[0])
)


def _takes_gelu_product(states: torch.Tensor, weight: torch.Tensor) -> bool:
    if not states.is_cuda or not use_custom_ops() or torch.is_grad_enabled():
        return False
    return states.dtype == weight.dtype in (torch.bfloat16, torch.float16)


def fuses_gelu(layer: nn.Linear, states: torch.Tensor) -> bool:
    """Whether the product itself computes the GELU after the layer: compiled, in 16 bits on a GPU, without gradients.

    It takes the tanh form, which differs by less than 0.0005.
    """
    return states.is_cuda and is_unmodified_linear(layer) and _takes_gelu_product(states, layer.weight)


def gelu_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(W x + b) of states (..., D)."""
    if _takes_gelu_product(states, weight):
        return _gelu_operator(states, weight, bias)
    return F.gelu(F.linear(states, weight, bias))


class YanFeedForward(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, config: YanConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN["gelu"]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if fuses_gelu(self.up_proj, hidden_states):
            return self.down_proj(_gelu_operator(hidden_states, self.up_proj.weight, self.up_proj.bias))
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class YanEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: self-mixer, then feed-forward."""

    def __init__(self, config: YanConfig, layer_idx: int) -> None:
        super().__init__()
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = SELF_MIXERS[config.encoder_mixer](config, layer_idx)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = YanFeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        mixed, _ = self.mixer(self.mixer_norm(hidden_states), attention_mask, padding_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(mixed)
        return hidden_states + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_states)))


class YanTimeEmbedding(nn.Module):
    """Sinusoidal features of 1000 t, then Linear and GELU: times (T,) to (T, D).

    Times lie in [0, 1]; without the factor most of the frequencies would hardly move.
    """

    def __init__(self, config: YanConfig) -> None:
        super().__init__()
        self.num_frequencies = config.hidden_size // 2
        self.proj = nn.Linear(2 * self.num_frequencies, config.hidden_size)

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        angles = sinusoid_angles(1000.0 * times, self.num_frequencies, longest_period=10000.0)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return F.gelu(self.proj(features.to(dtype_of(self.proj))))


def modulate(norm: nn.LayerNorm, states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A weightless norm of `states` (B, L, D) with the scale and shift, (B or 1, 1, D), that the time asks for."""
    return norm(states) * (1 + scale) + shift


class YanFlowLayer(GradientCheckpointingLayer):
    """Pre-norm block of the flow: self-mixer, cross-attention to the prompt where configured, feed-forward.

    `modulation` (B or 1, num_modulations, D) holds shift and scale of each of its norms; `positions` (L, D) are added
    to the queries of the cross-attention; `key` and `value` come from the prompt and are the same at every step. The
    canvas has no padding, so the mixer needs no mask.
    """

    def __init__(self, config: YanConfig, layer_idx: int) -> None:
        super().__init__()
        self.has_cross_attention = layer_idx in config.flow_layers_with_cross_attention
        self.num_modulations = 6 if self.has_cross_attention else 4
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
        self.mixer = SELF_MIXERS[config.flow_mixer](config, layer_idx)
        self.cross_attention = YanCrossAttention(config, layer_idx) if self.has_cross_attention else None
        self.feed_forward = YanFeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        positions: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        cross_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        shifts_and_scales = list(modulation.unsqueeze(2).unbind(1))
        normed = modulate(self.norm, hidden_states, *shifts_and_scales[:2])
        mixed, _ = self.mixer(normed, **kwargs)
        hidden_states = hidden_states + self.dropout(mixed)
        if self.cross_attention is not None:
            normed = modulate(self.norm, hidden_states, *shifts_and_scales[4:]) + positions
            attended, _ = self.cross_attention(normed, cross_attention_mask, (key, value), **kwargs)
            hidden_states = hidden_states + self.dropout(attended)
        normed = modulate(self.norm, hidden_states, *shifts_and_scales[2:4])
        return hidden_states + self.dropout(self.feed_forward(normed))


class YanDecoderLayer(GradientCheckpointingLayer):
    """Residual pre-norm feed-forward block that treats every token independently."""

    def __init__(self, config: YanConfig) -> None:
        super().__init__()
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = YanFeedForward(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))

"""Experts and their gate: K heads on the trunk's state, of which a token needs one (arXiv 2604.15009).

Letters: B batch, L canvas length, D hidden size, K experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from torch.nn import functional as F

from .chains_yan import as_markov, best_ending, best_path, chain_marginals, draw_path, log_partition
from .compilation_yan import is_exporting, opaque_operator, select_rows, use_custom_ops
from .experts_triton_yan import has_kernels_for, triton_heads
from .layers_yan import YanFeedForward, ZeroInitLinear, is_unmodified_linear


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


class YanGateTransitions(nn.Module):
    """How well the experts of neighbouring tokens go together, from the text that each of them would lead to."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.from_proj = nn.Linear(config.hidden_size, config.gate_rank)
        self.to_proj = ZeroInitLinear(config.hidden_size, config.gate_rank)

    def forward(self, ends, gate_log_probs):
        """log pi (B, L - 1, K, K) of each token's expert given that of the token before it, in float32.

        Args:
            ends: What the experts' heads predict, (B, L, K, D).
            gate_log_probs: The gate without neighbours, (B, L, K).
        """
        states = self.norm(ends)
        scores = self.from_proj(states[:, :-1]) @ self.to_proj(states[:, 1:]).transpose(-1, -2)
        return F.log_softmax(
            scores.float() * self.from_proj.out_features**-0.5 + gate_log_probs[:, 1:].unsqueeze(2), dim=-1
        )


@dataclass
class YanExpertPrior:
    """What the gate says of the experts of a batch of texts, before they are seen.

    Args:
        scope: `expert_scope` of the config.
        gate_log_probs: log pi_k (B, L, K): of every token, of every sequence (the same for all tokens), or of a
            chain's first token.
        log_transitions: Of a chain, (B, L - 1, K, K); else None.
    """

    scope: str
    gate_log_probs: torch.Tensor
    log_transitions: torch.Tensor | None = None

    def log_evidence(self, log_likelihood: torch.Tensor) -> torch.Tensor:
        """log p(y) (B,) of texts, summed over all experts, from log p_k(y) (B, L, K) of their tokens."""
        if self.scope == "chain":
            return log_partition(self._emissions(log_likelihood), self.log_transitions)
        if self.scope == "sequence":
            return (log_likelihood.sum(1) + self.gate_log_probs[:, 0]).logsumexp(-1)
        return (log_likelihood + self.gate_log_probs).logsumexp(-1).sum(1)

    def posterior(self, log_likelihood: torch.Tensor) -> "YanExpertPrior":
        """The same when the texts have been seen; argument as of `log_evidence`."""
        if self.scope == "chain":
            first, transitions = as_markov(self._emissions(log_likelihood), self.log_transitions)
            return YanExpertPrior("chain", first.unsqueeze(1).expand_as(self.gate_log_probs), transitions)
        if self.scope == "sequence":
            log_likelihood = log_likelihood.sum(1, keepdim=True)
        return YanExpertPrior(self.scope, (log_likelihood + self.gate_log_probs).log_softmax(-1))

    def information(self, log_likelihood: torch.Tensor) -> torch.Tensor:
        """What the texts say of their experts (B,), nats: KL of the posterior from the prior.

        It is 0 where all experts would generate the same. Its mean over the model's own texts is the mutual
        information of expert and text, given the prompt. Argument as of `log_evidence`.
        """
        shares = self.posterior(log_likelihood).marginals().exp()
        return (shares * log_likelihood).sum((1, 2)) - self.log_evidence(log_likelihood)

    def marginals(self) -> torch.Tensor:
        """log pi_k (B, L, K) of every token by itself."""
        if self.scope == "chain":
            return chain_marginals(self.gate_log_probs[:, 0], self.log_transitions)
        return self.gate_log_probs

    def choose(
        self, choice: str, uniform: torch.Tensor | None = None, ranks: torch.LongTensor | None = None
    ) -> torch.LongTensor | None:
        """One expert per token (B, L), or None for the "mixture".

        Args:
            choice: As in `choose_experts`; "ranked" is for no chain. uniform, ranks: The same; of a sequence those of
                its first token decide.
        """
        if choice == "mixture" or self.scope == "token":
            return choose_experts(self.gate_log_probs, choice, uniform, ranks)
        if self.scope == "sequence":
            first, gate = None if uniform is None else uniform[:, :1], self.gate_log_probs
            return choose_experts(gate[:, :1], choice, first, ranks).expand(gate.shape[:2])
        if choice == "argmax":
            return self.best_chain(torch.zeros_like(self.gate_log_probs))
        if choice == "sample":
            uniform = torch.rand_like(self.gate_log_probs) if uniform is None else uniform
            return draw_path(self.gate_log_probs[:, 0], self.log_transitions, uniform)
        raise ValueError(f"expert_choice={choice!r}: must be argmax, sample or mixture with expert_scope='chain'")

    def best_chain(self, tokens, fill=None, length_penalty: float = 1.0) -> torch.LongTensor:
        """The experts (B, L) of a chain that are the most probable together with the text that they lead to.

        Args:
            tokens: Log-probability (B, L, K) of each expert's best token. fill: The same of its best EOS, if there is
                one; the text's length is then chosen by `best_ending`, and behind it there is nothing but EOS.
        """
        tokens = self._emissions(tokens.float())
        if fill is not None:
            fill = self._emissions(fill.float())
            length = best_ending(tokens, fill, self.log_transitions, length_penalty)
            is_fill = torch.arange(tokens.shape[1], device=tokens.device) >= length.unsqueeze(1)
            tokens = torch.where(is_fill.unsqueeze(-1), fill, tokens)
        return best_path(tokens, self.log_transitions)

    def tempered(self, temperature: float) -> "YanExpertPrior":
        """The prior with its logits divided by a temperature of at least 0."""
        scale = 1 / max(temperature, 1e-4)
        transitions = None if self.log_transitions is None else (scale * self.log_transitions).log_softmax(-1)
        return YanExpertPrior(self.scope, (scale * self.gate_log_probs).log_softmax(-1), transitions)

    def _emissions(self, scores):
        """Scores (B, L, K) in which the first token has its prior, as the functions of chains want them."""
        return torch.cat([scores[:, :1] + self.gate_log_probs[:, :1], scores[:, 1:]], dim=1)


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
    ranks: torch.LongTensor | None = None
    temperature: float = 1.0
    judge: Callable | None = None

    def __call__(self, prior: YanExpertPrior, ends) -> tuple[YanExpertPrior, torch.LongTensor | None]:
        """The prior that they were chosen from, and the experts (B, L); None for the "mixture"."""
        if self.temperature != 1:
            prior = prior.tempered(self.temperature)
        if self.judge is not None:
            return prior, self.judge(ends, prior)
        return prior, prior.choose(self.name, self.uniform, self.ranks)


def _are_narrow(*tensors: torch.Tensor) -> bool:
    """Whether they are of one 16-bit type, and on one device."""
    is_narrow = {tensor.dtype for tensor in tensors} in ({torch.bfloat16}, {torch.float16})
    return is_narrow and all(tensor.device == tensors[0].device for tensor in tensors)


def _grouped_linear(
    tokens: torch.Tensor, sizes: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]
) -> torch.Tensor:
    parts = zip(tokens.split(sizes.tolist()), weights, biases, strict=True)
    return torch.cat([F.linear(*part) for part in parts])


def _grouped_linear_gradients(
    grad: torch.Tensor, tokens: torch.Tensor, sizes: torch.Tensor, weights: list[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    sizes = sizes.tolist()
    grads = grad.split(sizes)
    grad_tokens = torch.cat([part @ weight for part, weight in zip(grads, weights, strict=True)])
    grad_weights = [part.T @ inputs for part, inputs in zip(grads, tokens.split(sizes), strict=True)]
    return grad_tokens, grad_weights, [part.sum(0) for part in grads]


_gradients_operator = opaque_operator(
    _grouped_linear_gradients,
    lambda grad, tokens, sizes, weights: (
        torch.empty_like(tokens),
        [torch.empty_like(weight) for weight in weights],
        [grad.new_empty(weight.shape[0]) for weight in weights],
    ),
)


def _save_for_backward(ctx, inputs, output):
    tokens, sizes, weights, _ = inputs
    ctx.save_for_backward(tokens, sizes, *weights)


def _backward(ctx, grad):
    tokens, sizes, *weights = ctx.saved_tensors
    grad_tokens, grad_weights, grad_biases = _gradients_operator(grad.contiguous(), tokens, sizes, weights)
    return grad_tokens, None, grad_weights, grad_biases


# The K linear layers of the experts, applied to (T, in) tokens sorted by expert: a compiler has to know all shapes,
# and how many tokens an expert has depends on the data.
grouped_linear = opaque_operator(
    _grouped_linear, lambda tokens, sizes, weights, biases: tokens.new_empty(tokens.shape[0], weights[0].shape[0])
)
grouped_linear.register_autograd(_backward, setup_context=_save_for_backward)


def static_grouped_linear(tokens, sizes, weights, biases) -> torch.Tensor:
    """The same for CUDA graphs, in which no size may depend on the data: every token meets all K layers."""
    position = torch.arange(tokens.shape[0], device=tokens.device)
    expert = torch.searchsorted(sizes.cumsum(0), position, right=True)
    products = torch.stack([F.linear(tokens, *layer) for layer in zip(weights, biases, strict=True)])
    index = expert.view(1, -1, 1).expand(1, -1, products.shape[-1])
    return products.gather(0, index).squeeze(0)


def _sparse_heads(
    states: torch.Tensor,
    order: torch.Tensor,
    sizes: torch.Tensor,
    ups: list[torch.Tensor],
    up_biases: list[torch.Tensor],
    downs: list[torch.Tensor],
    down_biases: list[torch.Tensor],
) -> torch.Tensor:
    if has_kernels_for(states.device):
        return triton_heads(states, order, sizes, ups, up_biases, downs, down_biases)
    hidden = F.gelu(static_grouped_linear(states[order], sizes, ups, up_biases))
    outputs = static_grouped_linear(hidden, sizes, downs, down_biases)
    return torch.empty_like(outputs).index_copy_(0, order, outputs)


# The heads of 16-bit models on a GPU, in one operator because what a GPU knows is no question for a compiler: output
# (T, D) for tokens (T, D), as of `triton_heads`.
sparse_heads = opaque_operator(_sparse_heads, lambda states, *others: states.new_empty(states.shape))


@dataclass
class YanTokenGroups:
    """The tokens of a batch, sorted by their expert.

    Args:
        order: Flat indices (B L,) of the tokens, those of the first expert first.
        position: Each token's position (B L,) in that order. sizes: Number of tokens (K,) of each expert.
    """

    order: torch.Tensor
    position: torch.Tensor
    sizes: torch.Tensor


class YanExpertEmbedding(nn.Embedding):
    """What tells apart K experts that share one head, as large as the states that it is added to."""


class YanExperts(nn.Module):
    """K feed-forward heads on the trunk's state, or one head that is told which of K experts it is."""

    def __init__(self, config):
        super().__init__()
        width, number = config.expert_intermediate_size, 1 if config.share_expert_head else config.num_experts
        self.heads = nn.ModuleList(YanFeedForward(config, width) for _ in range(number))
        is_told = config.share_expert_head and config.num_experts > 1
        self.embedding = YanExpertEmbedding(config.num_experts, config.hidden_size) if is_told else None

    def forward(self, states):
        """Outputs of all experts, (B, L, K, D), from states (B, L, D)."""
        if self.embedding is not None:
            every = torch.arange(self.embedding.num_embeddings, device=states.device)
            return self.heads[0](states.unsqueeze(-2) + self.embedding(every))
        return torch.stack([head(states) for head in self.heads], dim=-2)

    def dispatch(self, chosen):
        """The tokens sorted by `chosen` (B, L), for any number of `combine`; None where there is no choice.

        It is `chosen` itself where the experts share a head, and in an exported program, which computes all heads.
        """
        if self.embedding is not None or (len(self.heads) > 1 and is_exporting()):
            return chosen
        if len(self.heads) == 1:
            return None
        chosen = chosen.flatten()
        # sorted by counting: a token's position is the number of those of earlier experts and earlier ones of its own
        counts = (torch.arange(len(self.heads), device=chosen.device).unsqueeze(-1) == chosen).cumsum(1)
        sizes = counts[:, -1]
        position = (counts + (sizes.cumsum(0) - sizes).unsqueeze(-1)).gather(0, chosen.unsqueeze(0)).squeeze(0) - 1
        order = torch.empty_like(position).scatter_(0, position, torch.arange(len(position), device=position.device))
        return YanTokenGroups(order, position, sizes)

    def combine(self, states, groups: YanTokenGroups | torch.Tensor | None):
        """Output (B, L, D) of each token's own expert.

        No other head is computed, but in exported programs and, outside of training, on a GPU that has no kernels for
        it: in float32 or under autocast, before Ampere, or without Triton.
        """
        if self.embedding is not None:
            return self.heads[0](states + self.embedding(groups))
        if groups is None:
            return self.heads[0](states)
        if isinstance(groups, torch.Tensor):
            index = groups[..., None, None].expand(*groups.shape, 1, states.shape[-1])
            return self(states).gather(-2, index).squeeze(-2)
        flat = states.flatten(0, 1)
        is_recordable = flat.is_cuda and not torch.is_grad_enabled()  # sizes on the host would halt a GPU
        # layers with an adapter or a hook have to be called, at the price of a graph break
        weights = self._weights() if is_recordable or use_custom_ops() else None
        if weights is not None and is_recordable and _are_narrow(flat, *chain(*weights)):
            return sparse_heads(flat, groups.order, groups.sizes, *weights).view_as(states)
        tokens = select_rows(flat, groups.order)
        if weights is None:
            parts = zip(self.heads, tokens.split(groups.sizes.tolist()), strict=True)
            # quantized layers can't take nothing; in training, every head has to be part of the graph
            outputs = torch.cat([head(part) for head, part in parts if len(part) or torch.is_grad_enabled()])
        else:
            product = static_grouped_linear if is_recordable else grouped_linear
            hidden = self.heads[0].act_fn(product(tokens, groups.sizes, *weights[:2]))
            outputs = product(hidden, groups.sizes, *weights[2:])
        return select_rows(outputs, groups.position).view_as(states).to(states.dtype)  # autocast narrows heads

    def _weights(self):
        """Weights and biases of the heads' first layers and of their second; None if a layer is more than these."""
        layers = [[getattr(head, name) for head in self.heads] for name in ("up_proj", "down_proj")]
        if not all(map(is_unmodified_linear, chain(*layers))):
            return None
        return [[getattr(layer, name) for layer in each] for each in layers for name in ("weight", "bias")]

    def mixture_of(self, states, gate_log_probs):
        """Gate-weighted mean output (B, L, D) of all heads."""
        return (self(states) * gate_log_probs.exp().to(states.dtype).unsqueeze(-1)).sum(-2)


def _argmax(gate_log_probs, uniform, ranks):
    return gate_log_probs.argmax(-1)


def _ranked(gate_log_probs, uniform, ranks):
    """The most probable is of rank 0; of two that are equal, the first comes first, as with argmax."""
    order = gate_log_probs.argsort(dim=-1, descending=True, stable=True)
    return order.gather(-1, ranks.expand(gate_log_probs.shape[:2]).unsqueeze(-1)).squeeze(-1)


def _sample(gate_log_probs, uniform, ranks):
    """The Gumbel-max trick."""
    uniform = torch.rand_like(gate_log_probs) if uniform is None else uniform
    return (gate_log_probs - torch.log(-torch.log(uniform.clamp(min=1e-20)))).argmax(-1)


def _mixture(gate_log_probs, uniform, ranks):
    return None


EXPERT_CHOICES = {"argmax": _argmax, "ranked": _ranked, "sample": _sample, "mixture": _mixture}


def choose_experts(
    gate_log_probs: torch.Tensor,
    choice: str,
    uniform: torch.Tensor | None = None,
    ranks: torch.LongTensor | None = None,
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

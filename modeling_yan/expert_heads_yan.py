"""The heads of the experts as stacked weights, and the ways to compute each token's own one.

Letters: B batch, L canvas length, T tokens, D hidden size, F width of a head, K heads.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils.generic import GeneralInterface

from .compilation_yan import is_exporting, opaque_operator, select_rows, use_custom_ops
from .configuration_yan import YanConfig
from .experts_triton_yan import has_kernels_for, triton_heads
from .layers_yan import gelu_linear


def one_head(
    tokens: torch.Tensor,
    up_proj: torch.Tensor,
    up_proj_bias: torch.Tensor,
    down_proj: torch.Tensor,
    down_proj_bias: torch.Tensor,
) -> torch.Tensor:
    """Outputs (..., D) of one head, whose weights are (F, D), (F,), (D, F) and (D,), for tokens (..., D)."""
    return F.linear(gelu_linear(tokens, up_proj, up_proj_bias), down_proj, down_proj_bias)


def every_head(
    tokens: torch.Tensor,
    up_proj: torch.Tensor,
    up_proj_bias: torch.Tensor,
    down_proj: torch.Tensor,
    down_proj_bias: torch.Tensor,
) -> torch.Tensor:
    """Outputs (K, T, D) of all heads for tokens (T, D), from weights as of `YanExpertHeads`."""
    inputs = tokens.expand(len(up_proj), *tokens.shape)
    hidden = F.gelu(torch.baddbmm(up_proj_bias.unsqueeze(1), inputs, up_proj.mT))
    return torch.baddbmm(down_proj_bias.unsqueeze(1), hidden, down_proj.mT)


def _take_chosen(outputs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """What each token (T,) gets from its own head, out of outputs (K, T, D)."""
    return outputs.gather(0, chosen.reshape(1, -1, 1).expand(1, *outputs.shape[1:])).squeeze(0)


def _grouped_linear(
    tokens: torch.Tensor, sizes: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor
) -> torch.Tensor:
    parts = zip(tokens.split(sizes.tolist()), weights.unbind(), biases.unbind(), strict=True)
    return torch.cat([F.linear(*part) for part in parts])


def _grouped_linear_gradients(
    grad: torch.Tensor, tokens: torch.Tensor, sizes: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    counts = sizes.tolist()
    grads = grad.split(counts)
    grad_tokens = torch.cat([part @ weight for part, weight in zip(grads, weights.unbind(), strict=True)])
    grad_weights = torch.empty_like(weights)
    for part, inputs, grad_weight in zip(grads, tokens.split(counts), grad_weights, strict=True):
        torch.mm(part.T, inputs, out=grad_weight)
    return grad_tokens, grad_weights, torch.stack([part.sum(0) for part in grads])


_gradients_operator = opaque_operator(
    _grouped_linear_gradients,
    lambda grad, tokens, sizes, weights: (
        torch.empty_like(tokens),
        torch.empty_like(weights),
        grad.new_empty(weights.shape[:2]),
    ),
)


def _save_for_backward(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_tokens, grad_weights, grad_biases = _gradients_operator(grad.contiguous(), *ctx.saved_tensors)
    return grad_tokens, None, grad_weights, grad_biases


# The K linear layers (K, out, in) of the experts, applied to (T, in) tokens sorted by expert: a compiler has to know
# all shapes, and how many tokens an expert has depends on the data.
grouped_linear = opaque_operator(
    _grouped_linear, lambda tokens, sizes, weights, biases: tokens.new_empty(tokens.shape[0], weights.shape[1])
)
grouped_linear.register_autograd(_backward, setup_context=_save_for_backward)


class TokenOrder(NamedTuple):
    """Tokens sorted by their head.

    Args:
        order: Flat indices (T,) of the tokens, those of the first head first.
        position: Each token's position (T,) in that order. sizes: Number of tokens (K,) of each head.
    """

    order: torch.Tensor
    position: torch.Tensor
    sizes: torch.Tensor


@dataclass
class YanTokenGroups:
    """Which tokens each of K heads has: the head (B, L) that was chosen for every token."""

    chosen: torch.Tensor
    num_heads: int
    found: TokenOrder | None = None

    def sort(self) -> TokenOrder:
        """The order of the tokens, which is found once for all steps of a solve."""
        if self.found is None:
            chosen = self.chosen.flatten()
            # by counting: a token's position is the number of those of earlier heads and earlier ones of its own
            counts = (torch.arange(self.num_heads, device=chosen.device).unsqueeze(-1) == chosen).cumsum(1)
            sizes = counts[:, -1]
            counts = counts + (sizes.cumsum(0) - sizes).unsqueeze(-1)
            position = counts.gather(0, chosen.unsqueeze(0)).squeeze(0) - 1
            tokens = torch.arange(len(position), device=position.device)
            self.found = TokenOrder(torch.empty_like(position).scatter_(0, position, tokens), position, sizes)
        return self.found


ExpertsFunction = Callable[["YanExpertHeads", torch.Tensor, YanTokenGroups], torch.Tensor]


def _eager(heads: "YanExpertHeads", tokens: torch.Tensor, groups: YanTokenGroups) -> torch.Tensor:
    """One head after the other, each with its own tokens."""
    order, position, sizes = groups.sort()
    tokens, weights = select_rows(tokens, order), heads.weights()
    if use_custom_ops():
        outputs = grouped_linear(F.gelu(grouped_linear(tokens, sizes, *weights[:2])), sizes, *weights[2:])
    else:
        each = zip(tokens.split(sizes.tolist()), *(tensor.unbind() for tensor in weights), strict=True)
        outputs = torch.cat([one_head(*part_and_weights) for part_and_weights in each])
    return select_rows(outputs, position)


def _all_heads(heads: "YanExpertHeads", tokens: torch.Tensor, groups: YanTokenGroups) -> torch.Tensor:
    """Every head with all tokens, of which each keeps what its own head says: no size depends on the data."""
    return _take_chosen(every_head(tokens, *heads.weights()), groups.chosen)


def _of_transformers(name: str) -> ExpertsFunction:
    """A function of transformers' own registry, which sorts or copies at every call."""

    def compute(heads: "YanExpertHeads", tokens: torch.Tensor, groups: YanTokenGroups) -> torch.Tensor:
        chosen = groups.chosen.reshape(-1, 1)  # the one expert of a token has all the weight
        return ALL_EXPERTS_FUNCTIONS[name](heads, tokens, chosen, tokens.new_ones(chosen.shape))

    return compute


def _sparse_heads(
    tokens: torch.Tensor,
    chosen: torch.Tensor,
    order: torch.Tensor,
    sizes: torch.Tensor,
    up_proj: torch.Tensor,
    up_proj_bias: torch.Tensor,
    down_proj: torch.Tensor,
    down_proj_bias: torch.Tensor,
) -> torch.Tensor:
    weights = up_proj, up_proj_bias, down_proj, down_proj_bias
    if has_kernels_for(tokens.device):
        return triton_heads(tokens, order, sizes, *weights)
    return _take_chosen(every_head(tokens, *weights), chosen)


# One operator, because what a GPU knows is no question for a compiler.
sparse_heads = opaque_operator(_sparse_heads, lambda tokens, *others: tokens.new_empty(tokens.shape))


def _fits_kernels(heads: "YanExpertHeads", tokens: torch.Tensor) -> bool:
    """Whether they are without gradients, on one GPU, and of one 16-bit type."""
    tensors = tokens, *heads.weights()
    is_narrow = {tensor.dtype for tensor in tensors} in ({torch.bfloat16}, {torch.float16})
    is_near = tokens.is_cuda and all(tensor.device == tokens.device for tensor in tensors)
    return is_near and is_narrow and not torch.is_grad_enabled()


def _triton(heads: "YanExpertHeads", tokens: torch.Tensor, groups: YanTokenGroups) -> torch.Tensor:
    """The package's kernels, in which a token meets its own head alone; all heads on a GPU that can't run them."""
    if not _fits_kernels(heads, tokens):
        found = f"{tokens.dtype} on {tokens.device.type}, gradients {'on' if torch.is_grad_enabled() else 'off'}"
        raise ValueError(f"experts_implementation='triton' ({found}): must be 16 bits on a GPU without gradients")
    order, _, sizes = groups.sort()
    return sparse_heads(tokens, groups.chosen.flatten(), order, sizes, *heads.weights())


def _auto(heads: "YanExpertHeads", tokens: torch.Tensor, groups: YanTokenGroups) -> torch.Tensor:
    """The fastest of the others that fits; sizes on the host would halt a GPU."""
    if tokens.is_cuda and not torch.is_grad_enabled():
        return (_triton if _fits_kernels(heads, tokens) else _all_heads)(heads, tokens, groups)
    is_exact = tokens.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if is_exact and torch.is_grad_enabled() and not use_custom_ops():
        # on a CPU it takes long to copy the gradients of single heads into that of the stack
        return EXPERTS_FUNCTIONS["grouped_mm"](heads, tokens, groups)
    return _eager(heads, tokens, groups)


class YanExpertsInterface(GeneralInterface):
    """How the tokens' own heads are computed, by the name that `experts_implementation` gives a model.

    A registry like `ALL_EXPERTS_FUNCTIONS` of transformers, where "batched_mm" and "grouped_mm" come from. Functions
    there weigh several experts of a token, and sort the tokens at every call. Here a token has one expert, and tokens
    are sorted once for all steps of a solve. A function takes heads, tokens (T, D) and `YanTokenGroups`, and returns
    the outputs (T, D).

    Example:

        >>> from modeling_yan.expert_heads_yan import EXPERTS_FUNCTIONS, YanExpertsInterface
        >>> YanExpertsInterface.register("mine", EXPERTS_FUNCTIONS["eager"])
        >>> list(EXPERTS_FUNCTIONS)
        ['auto', 'eager', 'all_heads', 'batched_mm', 'grouped_mm', 'triton', 'mine']
        >>> del YanExpertsInterface._global_mapping["mine"]
    """

    _global_mapping: dict[str, ExpertsFunction] = {
        "auto": _auto,
        "eager": _eager,
        "all_heads": _all_heads,
        "batched_mm": _of_transformers("batched_mm"),
        "grouped_mm": _of_transformers("grouped_mm"),
        "triton": _triton,
    }

    def check(self, name: str | None) -> str:
        """The name of a function; "auto" if None.

        Raises:
            ValueError: There is no such function.
        """
        name = "auto" if name is None else name
        if name not in self.valid_keys():
            raise ValueError(f"experts_implementation={name!r}: must be one of {', '.join(self)}")
        return name


EXPERTS_FUNCTIONS = YanExpertsInterface()


HEAD_TENSORS = [
    (layer, suffix, kind) for suffix, kind in (("", "weight"), ("_bias", "bias")) for layer in ("up_proj", "down_proj")
]  # a stack `up_proj_bias` has of every head its `up_proj.bias`


class YanExpertHeads(nn.Module):
    """K feed-forward heads, two linear layers with GELU between them, as stacked weights.

    Everything goes through `forward`, where PEFT, FSDP and accelerate look after the weights.

    Args:
        num_heads: Their number K. width: Size F of what is between the two layers.

    Attributes:
        up_proj, up_proj_bias, down_proj, down_proj_bias: (K, F, D), (K, F), (K, D, F) and (K, D).
    """

    # what transformers' functions ask of experts
    has_gate, has_bias, has_post_expert_norm, is_transposed, _is_expert_parallel = False, True, False, False, False
    act_fn = staticmethod(F.gelu)

    def __init__(self, config: YanConfig, num_heads: int, width: int) -> None:
        super().__init__()
        self.config, self.num_experts, size = config, num_heads, config.hidden_size
        self.up_proj = nn.Parameter(torch.empty(num_heads, width, size))
        self.up_proj_bias = nn.Parameter(torch.empty(num_heads, width))
        self.down_proj = nn.Parameter(torch.empty(num_heads, size, width))
        self.down_proj_bias = nn.Parameter(torch.empty(num_heads, size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as linear layers do; what is added to a draft starts as zero."""
        for weight, bias in ((self.up_proj, self.up_proj_bias), (self.down_proj, self.down_proj_bias)):
            init.normal_(weight, std=self.config.initializer_range)
            init.zeros_(bias)
        if self.config.refine_draft:
            init.zeros_(self.down_proj)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        """As in torch; what a state has of each head by itself, such as `0.up_proj.weight`, is stacked.

        Raises:
            ValueError: An adapter of single heads.
        """
        for name in state_dict:
            if name.startswith(prefix) and re.match(r"\d+\..*lora_", name[len(prefix) :]):
                raise ValueError(f"{name}: an adapter of single heads must be merged by the release that trained it")
        for layer, suffix, kind in HEAD_TENSORS:
            names = [f"{prefix}{index}.{layer}.{kind}" for index in range(self.num_experts)]
            if all(name in state_dict for name in names):
                state_dict[f"{prefix}{layer}{suffix}"] = torch.stack([state_dict.pop(name) for name in names])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def weights(self) -> tuple[torch.Tensor, ...]:
        """Weights and biases of the first layers, then of the second."""
        return self.up_proj, self.up_proj_bias, self.down_proj, self.down_proj_bias

    def forward(self, states: torch.Tensor, groups: YanTokenGroups | None = None) -> torch.Tensor:
        """Outputs (B, L, D) of each token's own head for states (B, L, D); without groups (..., K, D) of all heads."""
        if self.num_experts == 1:
            output = one_head(states, *(tensor.squeeze(0) for tensor in self.weights()))
            return output.unsqueeze(-2) if groups is None else output
        if groups is None:
            return every_head(states.flatten(0, -2), *self.weights()).movedim(0, 1).unflatten(0, states.shape[:-1])
        # an exported program runs without this package, and no size of it depends on what is chosen
        name = "all_heads" if is_exporting() else EXPERTS_FUNCTIONS.check(self.config._experts_implementation)
        compute: ExpertsFunction = EXPERTS_FUNCTIONS[name]
        return compute(self, states.flatten(0, 1), groups).view_as(states).to(states.dtype)  # autocast narrows heads


# The same for `from_pretrained`. Files have each head by itself, as those of transformers' mixtures of experts do.
CONVERSIONS: list[WeightConverter | WeightRenaming] = [
    WeightConverter(f"experts.heads.*.{layer}.{kind}", f"experts.heads.{layer}{suffix}", [MergeModulelist(dim=0)])
    for layer, suffix, kind in HEAD_TENSORS
]
register_checkpoint_conversion_mapping(YanConfig.model_type, CONVERSIONS, overwrite=True)
for without_experts in ("YanModel", "YanForAutoencoding"):
    register_checkpoint_conversion_mapping(without_experts, [], overwrite=True)


class YanExpertsMixin:
    """What a model does with `experts_implementation`, of `from_pretrained` or `set_experts_implementation`."""

    _has_experts = False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls._has_experts  # transformers looks for its decorator

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As in transformers, of the functions that YAN's experts have."""
        return EXPERTS_FUNCTIONS.check(requested_experts)

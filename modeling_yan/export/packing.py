"""Generation on a CPU with weights that lie as oneDNN's matrix products read them."""

import copy
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from ..expert_heads_yan import YanExpertHeads, YanTokenGroups

TYPICAL_TOKENS = 128  # of a product, for which the layout is chosen; any other number works

Model = TypeVar("Model", bound=nn.Module)


class SeparateHeads(nn.Module):
    """What `YanExpertHeads` compute, by linear layers of each head, which can be packed or quantised."""

    def __init__(self, heads: YanExpertHeads):
        super().__init__()
        each = zip(*(tensor.unbind() for tensor in heads.weights()), strict=True)
        self.heads = nn.ModuleList(
            nn.Sequential(_linear(up, up_bias), nn.GELU(), _linear(down, down_bias))
            for up, up_bias, down, down_bias in each
        )

    def forward(self, states: torch.Tensor, groups: YanTokenGroups | None = None) -> torch.Tensor:
        """As of `YanExpertHeads`."""
        if groups is None:
            return torch.stack([head(states) for head in self.heads], dim=-2)
        if len(self.heads) == 1:
            return self.heads[0](states)
        order, position, sizes = groups.sort()
        parts = zip(self.heads, states.flatten(0, 1)[order].split(sizes.tolist()), strict=True)
        outputs = torch.cat([head(part) for head, part in parts if len(part)])  # quantised layers can't take nothing
        return outputs[position].view_as(states).to(states.dtype)


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    width_out, width_in = weight.shape
    layer = nn.Linear(width_in, width_out, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def separate_heads(model: nn.Module) -> None:
    """Give each head of the experts, where a model has them, linear layers of its own."""
    experts: Any = getattr(getattr(model, "flow", None), "experts", None)
    if hasattr(experts, "heads"):
        experts.heads = SeparateHeads(experts.heads)


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed. What is left of `weight` has a shape and a type, but no numbers."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states.to(self.weight.dtype)  # autocast may have narrowed them
        return torch.ops.mkldnn._linear_pointwise(states, self.packed, self.bias, "none", [], "")


@torch.no_grad()
def with_packed_weights(model: Model) -> Model:
    """A copy of a model in float32 on the CPU whose linear layers have packed weights.

    A product of some hundred tokens otherwise spends a good part of its time on bringing the weight, as it lies in the
    checkpoint, into the order in which the processor needs it. Results agree up to rounding. The copy generates, with
    the same options; it follows no update of the model, and can be neither trained, copied nor saved.

    Raises:
        ValueError: A linear layer that is not on the CPU or not in float32.
        RuntimeError: torch was built without oneDNN.

    Example:

        >>> from modeling_yan import YanForFlowGeneration
        >>> from modeling_yan.export import with_packed_weights
        >>> model = YanForFlowGeneration.from_pretrained("examples/checkpoints/yan-transformer-tiny")
        >>> with_packed_weights(model).generate(return_prompt=False, max_new_tokens=4).shape[0]
        1
    """
    if not torch.backends.mkldnn.is_available():
        raise RuntimeError("packed weights need a torch that was built with oneDNN (torch.backends.mkldnn)")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    separate_heads(model)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward and "forward" not in vars(layer):
            _pack(layer)
    return refuse_saving(model, "packed weights")


def _pack(layer: nn.Linear) -> None:
    """Pack it in its place, where hooks stay with it."""
    weight = layer.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        found = f"a linear layer on {weight.device.type} in {weight.dtype}"
        raise ValueError(f"{found}: must be on the CPU in torch.float32")
    layer.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TYPICAL_TOKENS)
    layer.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    layer.__class__ = PackedLinear


def refuse_saving(model: Model, what: str) -> Model:
    """The model itself, whose `save_pretrained` from now on raises NotImplementedError."""
    model.save_pretrained = partial(_refuse, what)  # type: ignore[assignment]
    return model


def _refuse(what: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError(f"a model with {what} is no checkpoint: save the one that it was made from")

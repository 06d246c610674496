"""Generation on a CPU with weights that lie as oneDNN's matrix products read them."""

import copy
from functools import partial

import torch
from torch import nn

TYPICAL_TOKENS = 128  # of a product, for which the layout is chosen; any other number works


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed. What is left of `weight` has a shape and a type, but no numbers."""

    def forward(self, states):
        states = states.to(self.weight.dtype)  # autocast may have narrowed them
        if states.numel() == 0:  # an expert without tokens
            return states.new_empty(*states.shape[:-1], self.out_features)
        return torch.ops.mkldnn._linear_pointwise(states, self.packed, self.bias, "none", [], "")


@torch.no_grad()
def with_packed_weights(model: nn.Module):
    """A copy of a model in float32 on the CPU whose linear layers have packed weights.

    A product of some hundred tokens otherwise spends a good part of its time on bringing the weight, as it lies in the
    checkpoint, into the order in which the processor needs it. Results agree up to rounding. The copy generates, with
    the same options; it follows no update of the model, and can be neither trained, copied nor saved.

    Raises:
        ValueError: A linear layer that is not on the CPU or not in float32.
        RuntimeError: torch was built without oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        raise RuntimeError("packed weights need a torch that was built with oneDNN (torch.backends.mkldnn)")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in model.modules():
        is_plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
        if is_plain and "forward" not in vars(layer):
            _pack(layer)
    return refuse_saving(model, "packed weights")


def _pack(layer: nn.Linear):
    """Pack it in its place, where hooks stay with it."""
    weight = layer.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        found = f"a linear layer on {weight.device.type} in {weight.dtype}"
        raise ValueError(f"{found}: must be on the CPU in torch.float32")
    layer.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TYPICAL_TOKENS)
    layer.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    layer.__class__ = PackedLinear


def refuse_saving(model: nn.Module, what: str) -> nn.Module:
    """The model itself, whose `save_pretrained` from now on raises NotImplementedError."""
    model.save_pretrained = partial(_refuse, what)
    return model


def _refuse(what, *args, **kwargs):
    raise NotImplementedError(f"a model with {what} is no checkpoint: save the one that it was made from")

"""Generation on a CPU with weights that lie as oneDNN's matrix products read them."""

import copy

import torch
from torch import nn

TYPICAL_TOKENS = 128  # of a product, for which the layout is chosen; any other number works


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed. What is left of `weight` has a shape and a type, but no numbers."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, device="meta", dtype=layer.weight.dtype)
        self.bias = layer.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), TYPICAL_TOKENS)

    def forward(self, states):
        if states.numel() == 0:  # an expert without tokens
            return states.new_empty(*states.shape[:-1], self.out_features)
        return torch.ops.mkldnn._linear_pointwise(states, self.packed, self.bias, "none", [], "")


@torch.no_grad()
def with_packed_weights(model: nn.Module):
    """A copy of a model in float32 on the CPU whose linear layers have packed weights.

    A product of some hundred tokens otherwise spends a good part of its time on bringing the weight, as it lies in the
    checkpoint, into the order in which the processor needs it. Results agree up to rounding. The copy generates, with
    the same options; it follows no update of the model, and can be neither trained nor saved.

    Raises:
        ValueError: A linear layer that is not on the CPU or not in float32.
        RuntimeError: torch was built without oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        raise RuntimeError("packed weights need a torch that was built with oneDNN (torch.backends.mkldnn)")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
                setattr(module, name, PackedLinear(_checked(layer)))
    return model


def _checked(layer):
    if layer.weight.device.type != "cpu" or layer.weight.dtype != torch.float32:
        found = f"a linear layer on {layer.weight.device.type} in {layer.weight.dtype}"
        raise ValueError(f"{found}: must be on the CPU in torch.float32")
    return layer

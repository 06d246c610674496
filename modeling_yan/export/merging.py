"""Generation with fewer products: two linear layers that follow each other become one."""

import copy

import torch
from torch import nn

from ..mamba_yan import YanBidirectionalMamba


@torch.no_grad()
def _merge_output(mixer: YanBidirectionalMamba):
    """Give a mixer one projection of both scans' outputs, instead of one of each and one of the two results."""
    joined = mixer.out_proj
    outputs = [mixer.forward_mamba.out_proj, mixer.backward_mamba.out_proj]
    halves = joined.weight.double().chunk(2, dim=1)
    weight = torch.cat([half @ output.weight.double() for half, output in zip(halves, outputs, strict=True)], dim=1)
    bias = joined.bias.double()
    for half, output in zip(halves, outputs, strict=True):
        if output.bias is not None:
            bias = bias + half @ output.bias.double()
    merged = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=joined.weight.dtype)
    merged.weight.copy_(weight)
    merged.bias.copy_(bias)
    mixer.out_proj = merged
    mixer.forward_mamba.out_proj = mixer.backward_mamba.out_proj = nn.Identity()


def with_merged_projections(model):
    """A copy of a YAN model in which each bidirectional Mamba has one output projection instead of three.

    Both directions project their scan's output, and the pair of results is projected once more, with nothing between:
    one matrix, the product of the two, does the same. At the base size that is a tenth of the arithmetic of a step.
    Results agree up to rounding. The copy generates, with the same options; its weights are no checkpoint of this
    architecture, so it is not to be saved. A model without Mamba is copied as it is.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, YanBidirectionalMamba):
            _merge_output(module)
    return model

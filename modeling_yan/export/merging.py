"""Generation with fewer products: two linear layers that follow each other become one."""

import copy
from functools import partial

import torch
from torch import nn

from ..mamba_yan import YanBidirectionalMamba


@torch.no_grad()
def _merge_output(mixer: YanBidirectionalMamba):
    """Give a mixer one projection of both scans' outputs, instead of one of each and one of the two results."""
    joined, inner = mixer.out_proj, mixer.forward_mamba.out_proj.in_features
    merged = nn.Linear(2 * inner, joined.out_features, device=joined.weight.device, dtype=joined.weight.dtype)
    outputs = mixer.forward_mamba.out_proj, mixer.backward_mamba.out_proj
    halves = zip(joined.weight.double().chunk(2, dim=1), outputs, strict=True)
    merged.weight.copy_(torch.cat([half @ output.weight.double() for half, output in halves], dim=1))
    nothing = joined.weight.new_zeros(inner)
    merged.bias.copy_(joined(torch.cat([output(nothing) for output in outputs])))
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
    return refuse_saving(model, "merged projections")


def refuse_saving(model: nn.Module, what: str) -> nn.Module:
    """The model itself, whose `save_pretrained` from now on raises NotImplementedError."""
    model.save_pretrained = partial(_refuse, what)
    return model


def _refuse(what, *args, **kwargs):
    raise NotImplementedError(f"a model with {what} is no checkpoint: save the one that it was made from")

"""Generation with int8 weights on a CPU."""

import copy
import warnings

from torch import nn
from torch.ao import quantization

from ..modeling_yan import YanForFlowGeneration
from .packing import refuse_saving, separate_heads

PARTS = ("model.layers", "flow.layers", "flow.experts", "decoder", "lm_head")  # not the gate nor the time embedding
EXACT = ("x_proj", "dt_proj", "out_proj")  # Mamba's step sizes, and outputs a hundred deviations from the mean


def with_int8_weights(model: YanForFlowGeneration) -> YanForFlowGeneration:
    """A copy of a `YanForFlowGeneration` in float32 on the CPU that has int8 weights in its linear layers.

    The inputs of a layer are quantised as they come, by one scale for the whole batch, so a prompt may get other
    tokens beside other prompts. The copy generates, with the same options; it can be neither trained nor saved.

    Raises:
        ValueError: The model is not on the CPU or not in float32.

    Example:

        >>> from modeling_yan import YanForFlowGeneration
        >>> from modeling_yan.export import with_int8_weights
        >>> model = YanForFlowGeneration.from_pretrained("examples/checkpoints/yan-transformer-tiny")
        >>> with_int8_weights(model).generate(return_prompt=False, max_new_tokens=4).shape[0]
        1
    """
    weight = model.lm_head.weight
    if callable(weight):  # of a layer that torch has quantised
        raise ValueError("a model with int8 weights: must be the model that it was made from")
    if weight.device.type != "cpu" or str(weight.dtype) != "torch.float32":
        raise ValueError(f"a model on {weight.device.type} in {weight.dtype}: must be on the CPU in torch.float32")
    model = copy.deepcopy(model).eval()
    separate_heads(model)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for module in linear.values():  # subclasses differ in how they start only, but torch quantises by class
        module.__class__ = nn.Linear
    chosen = [name for name in linear if name.startswith(PARTS) and not name.endswith(EXACT)]
    layers = dict.fromkeys(chosen, quantization.default_dynamic_qconfig)
    with warnings.catch_warnings():
        # torch.ao is deprecated, but torchao takes 1.5 to 1.9 times as long (docs/log.md, 2026-11-29)
        warnings.simplefilter("ignore")
        quantization.quantize_dynamic(model, layers, inplace=True)
    return refuse_saving(model, "int8 weights")

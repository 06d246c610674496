"""How much a training step computes, and how near the machine comes to its peak.

Floating-point operations are counted as in the literature: the matrix products of the model (two operations per
multiply-add), with nothing for element-wise work, and without what gradient checkpointing repeats. A backward pass
costs twice its forward pass where weights are trained.
"""

import time
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

PEAK_SIZE = 2048  # of the square matrices whose product measures the peak


def linear_flops(*modules: nn.Module) -> int:
    """Operations per token of all linear layers and depthwise convolutions inside the modules."""
    parts = [part for module in modules for part in module.modules() if isinstance(part, nn.Linear | nn.Conv1d)]
    return 2 * sum(part.weight.numel() for part in parts)


def training_flops(model: Any, batch_size: int, source: int, canvas: int = 0, num_flow_steps: int = 0) -> int:
    """Operations of one forward and backward pass of a stage's model.

    Args:
        model: `YanForAutoencoding` or `YanForFlowGeneration`.
        source, canvas: Widths of the batch in tokens; the autoencoder has no canvas.
        num_flow_steps: Solver steps that the objective runs through.
    """
    config, objective = model.config, model.config.objective
    decoder = linear_flops(model.decoder, model.lm_head)
    if not hasattr(model, "flow"):
        return 3 * batch_size * (_encoder_flops(model, source) + source * decoder)
    source = source + config.num_answer_slots
    encoder = _encoder_flops(model, source)
    flow, layers = model.flow, model.flow.layers
    crossing = [layer.cross_attention for layer in layers if layer.has_cross_attention]
    keys = sum(linear_flops(cross.k_proj, cross.v_proj) for cross in crossing)
    trunk = linear_flops(layers) - keys + 4 * config.hidden_size * source * len(crossing)
    trunk += _attention_flops(config, config.flow_mixer, canvas) * len(layers)
    heads = flow.experts.heads
    head = 2 * (heads.up_proj[0].numel() + heads.down_proj[0].numel())
    experts = config.num_experts * head
    if num_flow_steps == 0:  # the encoder's draft alone
        return batch_size * round(3 * encoder + source * keys + 3 * canvas * decoder)
    if config.train_expert_choice == "posterior":  # several experts are decoded once, without a backward pass
        passes = num_flow_steps * trunk + experts + (num_flow_steps - 1) * head
        num_reads = num_flow_steps + (config.num_experts / 3 if config.num_experts > 1 else 0)
        canvas_flops = passes + linear_flops(flow.gate) + num_reads * decoder
        target = _encoder_flops(model, canvas) if objective.mse_weight else 0
    else:
        passes = (1 + num_flow_steps) * trunk + experts + num_flow_steps * head
        canvas_flops = passes + 2 * linear_flops(flow.gate) + decoder
        target = _encoder_flops(model, canvas)
    parts = (objective.freeze_encoder, objective.freeze_embeddings, objective.freeze_flow, objective.freeze_decoder)
    return batch_size * round(
        encoder * (1 if objective.freeze_encoder else 3)
        + target * (1 if objective.freeze_encoder or objective.detach_target_latents else 3)
        + (1 if all(parts) else 3) * (source * keys + canvas * canvas_flops)
    )


def baseline_flops(model: Any, batch_size: int, source: int, target: int) -> int:
    """Operations of one forward and backward pass of a baseline, without the scores of its attention.

    Args:
        source, target: Widths of the batch in tokens; `source` is all of it where both are one sequence.
    """
    if model.config.is_encoder_decoder:
        heads = [model.lm_head] if hasattr(model, "lm_head") else []  # a BERT's is in its decoder
        tokens = source * linear_flops(model.encoder) + target * linear_flops(model.decoder, *heads)
    else:
        tokens = (source + target) * linear_flops(model.model) + (target or source) * linear_flops(model.lm_head)
    return 3 * batch_size * tokens


def _encoder_flops(model: Any, length: int) -> int:
    config, pretrained = model.config, model.config.encoder
    if pretrained is not None:
        attention = 4 * pretrained.hidden_size * length * pretrained.num_hidden_layers
        return length * (linear_flops(model.model.encoder, model.model.latents) + attention)
    attention = _attention_flops(config, config.encoder_mixer, length) * config.num_encoder_layers
    return length * (linear_flops(model.model.layers) + attention)


def _attention_flops(config: PreTrainedConfig, mixer: str, length: int) -> int:
    """Per token and layer: scores and weighted sum, which no linear layer counts."""
    return 4 * config.hidden_size * length if mixer == "attention" else 0


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second that a large matrix product reaches on one device, the best of three."""
    matrix = torch.ones(PEAK_SIZE, PEAK_SIZE, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):  # the first one warms up
        _synchronize(device)
        start = time.perf_counter()
        matrix @ matrix
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * PEAK_SIZE**3 / min(seconds[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

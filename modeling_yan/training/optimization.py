"""Optimizer, learning-rate schedule and the moving average of the weights."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .arguments import PretrainingArguments


def make_optimizer(
    arguments: PretrainingArguments, model: PreTrainedModel
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with the groups of `make_groups`, and the schedule of its learning rate."""
    rates = arguments.learning_rate, arguments.encoder_learning_rate
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    optimizer = torch.optim.AdamW(make_groups(model, arguments.weight_decay, *rates), betas=betas)
    factor = {"constant_with_warmup": _constant, "cosine": _cosine}[arguments.lr_scheduler_type]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, arguments))


def make_groups(
    model: Any, weight_decay: float, learning_rate: float, encoder_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """The trained parameters for an optimizer of torch, in groups.

    Only the weights of linear layers, convolutions and experts decay: not biases, norms and embeddings, and not what a
    Mamba has as bare parameters, of which 0 means something else (the rate A = -exp(A_log) at which it forgets).

    Args:
        model: A YAN model, or a baseline.
        encoder_learning_rate: Of a pretrained encoder and its embeddings, which forget what they know at the rate that
            new layers need. None for the rate of the others.

    Raises:
        ValueError: A rate for the encoder of a model that has no pretrained one.
    """
    encoder = set() if encoder_learning_rate is None else _encoder_parameters(model, encoder_learning_rate)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_weight = name.endswith(("weight", "up_proj", "down_proj")) and parameter.dim() > 1
            is_decayed = is_weight and id(parameter) not in embeddings
            groups.setdefault((id(parameter) in encoder, not is_decayed), []).append(parameter)
    return [
        {
            "params": groups[is_encoder, is_plain],
            "lr": encoder_learning_rate if is_encoder else learning_rate,
            "weight_decay": 0.0 if is_plain else weight_decay,
        }
        for is_encoder, is_plain in sorted(groups)
    ]


def _encoder_parameters(model: PreTrainedModel, rate: float) -> set[int]:
    encoder = model.get_encoder() if model.config.is_encoder_decoder else getattr(model.base_model, "encoder", None)
    if encoder is None:
        raise ValueError(f"encoder_learning_rate={rate}: must be None without a pretrained encoder")
    return {id(parameter) for parameter in encoder.parameters()}


def follow_schedule(scheduler: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Set the learning rate that the schedule has at its step: that of a longer run is another than the saved one."""
    groups = scheduler.optimizer.param_groups
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)


def _constant(step: int, arguments: PretrainingArguments) -> float:
    """Linear warm-up, constant, linear decay at the end."""
    warm = (step + 1) / max(1, arguments.warmup_steps)
    left = (arguments.max_steps - step) / max(1, arguments.decay_steps)
    return min(1.0, warm, left)


def _cosine(step: int, arguments: PretrainingArguments) -> float:
    """Linear warm-up, then half a cosine to 0."""
    done = (step - arguments.warmup_steps) / max(1, arguments.max_steps - arguments.warmup_steps)
    return min((step + 1) / max(1, arguments.warmup_steps), (1 + math.cos(math.pi * min(1.0, max(0.0, done)))) / 2)


class MovingAverage:
    """Exponential moving average of a model's trained weights, w' <- decay w' + (1 - decay) w after every update.

    The decay grows from 0 as (1 + n) / (10 + n) with the number n of updates, so that the random start is soon
    forgotten. The average has the parameters' own layout, so sharded ones stay sharded.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self.parameters: list[torch.Tensor] = [
            parameter for parameter in model.parameters() if parameter.requires_grad
        ]
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights into the average."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"num_updates": self.num_updates, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.num_updates = state["num_updates"]
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)

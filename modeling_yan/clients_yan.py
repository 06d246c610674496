"""What other libraries ask of a YAN model: the scores of every token for TRL, and what is refused.

Refused is what a client asks because it takes the model for a causal one.

Letters of the shape comments: B batch, L width of the labels, V vocabulary.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from .checks_yan import IGNORE_INDEX


def open_options(config: GenerationConfig) -> list[str]:
    """The options with a general default that the config leaves open."""
    return [name for name in GenerationConfig._get_default_generation_params() if getattr(config, name, None) is None]


def watch_trainers() -> None:
    """Let the Trainer that is being made, if any, log every loss term and refuse what it can't train.

    Not done by an import: a model that only generates needs no trainer.
    """
    trainer = sys.modules.get("transformers.trainer")
    if trainer is None:
        return
    from .trainer_yan import YanTrainerCallback

    # by name: remote code has a class of its own
    if not any(getattr(each, "__name__", None) == "YanTrainerCallback" for each in trainer.DEFAULT_CALLBACKS):
        trainer.DEFAULT_CALLBACKS.append(YanTrainerCallback)


def refuse_prompt_learning(model: Any) -> None:
    """Raise ValueError for a model of PEFT that learns a prompt: `generate` would not see it."""
    config = getattr(model, "active_peft_config", None)
    if config is not None and getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"peft_type={config.peft_type.value}: must be an adapter of layers, such as LoRA, because generate of YAN "
            "takes no learned prompts"
        )


@dataclass
class YanTokenOutput(ModelOutput):
    """A training step in the terms of TRL's SFTTrainer; all but `loss` are (B, L).

    Args:
        loss: The objective.
        log_probs: Minus the objective at every target token, so that minus their mean is the objective.
        entropy: Entropy of the decoded tokens, nats. is_top1: Whether a decoded token is the target.
        label_mask: Where the targets are. All others are 0 elsewhere.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


def token_output(loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> YanTokenOutput:
    """Scores of the decoded tokens, logits (B, L, V), against the labels (B, L) in their positions."""
    mask = labels != IGNORE_INDEX
    log_probs = logits.detach().float().log_softmax(-1)
    return YanTokenOutput(
        loss=loss,
        log_probs=-loss * mask,
        entropy=-(log_probs.exp() * log_probs).sum(-1) * mask,
        is_top1=(log_probs.argmax(-1) == labels) & mask,
        label_mask=mask,
    )


def refuse_cache(kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError if a cache is handed in, as PEFT's prefix tuning does."""
    if kwargs.get("past_key_values") is not None:
        raise ValueError("past_key_values: must be None, there is no cache; of PEFT use LoRA, not prefix tuning")


def refuse_echo(
    input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, labels: torch.Tensor, eos_token_id: int | None
) -> None:
    """Raise ValueError if the labels (B, L) are the prompt's own tokens, as in batches for causal models.

    A model that sees its target learns to copy it. One row alone may be a pair whose target is its source: if
    all its tokens are labels, EOS after them, it passes.
    """
    if input_ids is None or input_ids.shape != labels.shape or torch.compiler.is_compiling():
        return
    is_target, is_repeated = labels != IGNORE_INDEX, input_ids == labels
    if attention_mask is not None and attention_mask.shape == labels.shape:
        is_repeated = is_repeated & attention_mask.bool()
    if not (is_repeated | ~is_target).all() or not is_target.any():
        return
    if len(labels) == 1 and is_target.all() and labels[0, -1] == eos_token_id:
        return
    raise ValueError(
        f"labels of shape {tuple(labels.shape)} repeat input_ids: must be what the model is to generate, and "
        "input_ids the prompt without it. FlowCollator of modeling_yan.data makes such batches of rows with source "
        "and target, CompletionCollator for TRL's SFTTrainer; collators for causal models do not"
    )


def refuse_harness_likelihood() -> None:
    """Raise NotImplementedError if it is lm-evaluation-harness that asks, for the likelihood of a continuation.

    It would take the logits of the canvas after a text for the causal ones of the text itself, and get confident
    numbers. Its tasks that generate are served.
    """
    frame = sys._getframe() if "lm_eval" in sys.modules else None
    while frame is not None:
        if frame.f_code.co_name == "_loglikelihood_tokens" and frame.f_globals["__name__"].startswith("lm_eval."):
            raise NotImplementedError(
                "output_type: must be generate_until for YAN in lm-evaluation-harness. Multiple choice, loglikelihood "
                "and perplexity need the logits of a causal model, which YAN lacks; see examples/lm_eval. "
                "model.log_likelihood scores a text"
            )
        frame = frame.f_back

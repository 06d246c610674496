"""What the trainers of transformers and TRL need of a YAN model: loss terms in their logs, scores of every token.

Letters of the shape comments: B batch, L width of the labels, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import distributed
from transformers import GenerationConfig, TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS
from transformers.utils import ModelOutput


class RunningMeans:
    """Means of named scalars, added up on their device until they are asked for."""

    def __init__(self):
        self.totals, self.count = {}, 0

    def add(self, scalars: dict[str, torch.Tensor]):
        self.totals = {name: self.totals.get(name, 0) + scalar.float() for name, scalar in scalars.items()}
        self.count += 1

    def take(self) -> dict[str, float]:
        """The means since the last call, over all processes; nothing where nothing was added."""
        totals, count = self.totals, self.count
        self.totals, self.count = {}, 0
        if count == 0:
            return {}
        means = torch.stack(list(totals.values())) / count
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(means)
            means /= distributed.get_world_size()
        return dict(zip(totals, means.tolist(), strict=True))


class YanTrainerCallback(TrainerCallback):
    """Adds the means of the model's `loss_terms` to every log of a Trainer; models without such terms are left alone.

    A training log gets the means over all forward passes since the last one, an evaluation log and the metrics of
    `evaluate` and `predict` those over their batches, under their prefix. Every new Trainer has one, before its
    trackers, which therefore see the terms. It also takes back what Seq2SeqTrainer writes into the model's generation
    config.
    """

    def __init__(self):
        self.training, self.evaluation = RunningMeans(), RunningMeans()
        self.latest = None

    def _collect(self, model, means):
        terms = getattr(model, "loss_terms", None)
        if terms is not None and terms is not self.latest:  # else the step made no pass with labels
            means.add(terms)
            self.latest = terms

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = RunningMeans()

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self._collect(model, self.training)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._collect(model, self.training)

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self._collect(model, self.evaluation)
        if getattr(args, "predict_with_generate", False):
            reopen_options(model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        means = self.training.take() if "loss" in logs else self._evaluation_means(logs)
        logs.update(means)  # the trackers come after this callback
        state.log_history[-1].update(means)

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        metrics.update(self._evaluation_means(metrics))

    def _evaluation_means(self, metrics):
        prefix = next((name.removesuffix("runtime") for name in metrics if name.endswith("_runtime")), "")
        return {prefix + name: mean for name, mean in self.evaluation.take().items()}


DEFAULT_CALLBACKS.append(YanTrainerCallback)


def open_options(config: GenerationConfig) -> list[str]:
    """The options with a general default that the config leaves open."""
    return [name for name in GenerationConfig._get_default_generation_params() if getattr(config, name, None) is None]


def reopen_options(model):
    """Set the general defaults back to None that Seq2SeqTrainer has written since the model's last `generate`."""
    defaults = GenerationConfig._get_default_generation_params()
    for name in getattr(model, "open_options", ()):
        if getattr(model.generation_config, name) == defaults[name]:
            setattr(model.generation_config, name, None)


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


def token_output(loss: torch.Tensor, logits: torch.Tensor, labels: torch.LongTensor) -> YanTokenOutput:
    """Scores of the decoded tokens, logits (B, L, V), against the labels (B, L) in their places."""
    mask = labels != -100
    log_probs = logits.detach().float().log_softmax(-1)
    return YanTokenOutput(
        loss=loss,
        log_probs=-loss * mask,
        entropy=-(log_probs.exp() * log_probs).sum(-1) * mask,
        is_top1=(log_probs.argmax(-1) == labels) & mask,
        label_mask=mask,
    )


def refuse_causal_batch(input_ids: torch.LongTensor | None, labels: torch.LongTensor):
    """Raise ValueError if the labels (B, L) are the ids of the prompt itself, as in batches for causal models."""
    if input_ids is None or input_ids.shape != labels.shape:
        return
    targets = labels != -100
    if targets.any() and torch.equal(input_ids[targets], labels[targets]):
        raise ValueError(
            "the labels are the prompt's own tokens: give SFTTrainer data_collator=CompletionCollator(...) of "
            "modeling_yan.data, which separates prompt and completion"
        )

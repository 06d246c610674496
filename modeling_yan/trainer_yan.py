"""What the trainers of transformers and TRL need of a YAN model: loss terms in their logs, scores of every token.

And what is refused, because a client takes the model for a causal one.

Letters of the shape comments: B batch, L width of the labels, V vocabulary.
"""

import sys
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

    def add(self, scalars: dict[str, torch.Tensor], weight: int = 1):
        self.totals = {name: self.totals.get(name, 0) + weight * scalar.float() for name, scalar in scalars.items()}
        self.count += weight

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
    `evaluate` and `predict` those over their rows, under their prefix. Every new Trainer has one, before its
    trackers, which therefore see the terms. It also takes back what Seq2SeqTrainer writes into the model's generation
    config, tells a collator that draws at random which epoch it is, and refuses what a Trainer can't train.
    """

    def __init__(self):
        self.training, self.evaluation = RunningMeans(), RunningMeans()
        self.latest = None

    def _collect(self, model, means, by_row: bool = False):
        terms = getattr(model, "loss_terms", None)
        if terms is not None and terms is not self.latest:  # else the step made no pass with labels
            means.add(terms, model.num_loss_rows if by_row else 1)
            self.latest = terms

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if hasattr(model, "loss_terms"):
            refuse_prompt_learning(model)
            refuse_label_smoothing(args, model)

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = RunningMeans()

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        collator = getattr(train_dataloader, "collate_fn", None)
        collator = getattr(collator, "data_collator", collator)  # inside of what removes columns
        if hasattr(collator, "set_epoch"):
            collator.set_epoch(int(state.epoch or 0))

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self._collect(model, self.training)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._collect(model, self.training)

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self._collect(model, self.evaluation, by_row=True)
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


def refuse_prompt_learning(model):
    """Raise ValueError for a model of PEFT that learns a prompt: `generate` would not see it."""
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"peft_type={config.peft_type.value}: must be an adapter of layers, such as LoRA, because generate of YAN "
            "has no place for learned prompts"
        )


def refuse_label_smoothing(args, model):
    """Raise ValueError if the Trainer would put a smoothed cross-entropy in the place of the model's own loss."""
    has_other_terms = hasattr(model, "flow") or model.config.mmd_weight or model.config.latent_norm_weight
    if args.label_smoothing_factor and has_other_terms:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor}: must be 0, because the Trainer would train the "
            "smoothed cross-entropy alone, without the model's other loss terms"
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


def refuse_cache(kwargs):
    """Raise ValueError if a cache is handed in, as PEFT's prefix tuning does."""
    if kwargs.get("past_key_values") is not None:
        raise ValueError("past_key_values: must be None, there is no cache; of PEFT use LoRA, not prefix tuning")


def refuse_echo(input_ids, attention_mask, labels: torch.LongTensor, eos_token_id: int | None):
    """Raise ValueError if the labels (B, L) are the prompt's own tokens, as in batches for causal models.

    A model that sees what it is to write learns to copy it. One row alone may be a pair whose target is its source: if
    all its tokens are labels, EOS behind them, it passes.
    """
    if input_ids is None or input_ids.shape != labels.shape or torch.compiler.is_compiling():
        return
    is_target, is_repeated = labels != -100, input_ids == labels
    if attention_mask is not None and attention_mask.shape == labels.shape:
        is_repeated = is_repeated & attention_mask.bool()
    if not (is_repeated | ~is_target).all() or not is_target.any():
        return
    if len(labels) == 1 and is_target.all() and labels[0, -1] == eos_token_id:
        return
    raise ValueError(
        f"labels of shape {tuple(labels.shape)} repeat input_ids: must be what the model is to write, and input_ids "
        "the prompt without it. FlowCollator of modeling_yan.data makes such batches of rows with source and target, "
        "CompletionCollator for TRL's SFTTrainer; collators for causal models do not"
    )


def refuse_harness_likelihood():
    """Raise NotImplementedError if it is lm-evaluation-harness that asks, for the likelihood of a continuation.

    It would take the logits of the canvas behind a text for the causal ones of the text itself, and get confident
    numbers. Its tasks that generate are served.
    """
    frame = sys._getframe() if "lm_eval" in sys.modules else None
    while frame is not None:
        if frame.f_code.co_name == "_loglikelihood_tokens" and frame.f_globals["__name__"].startswith("lm_eval."):
            raise NotImplementedError(
                "output_type: must be generate_until for YAN in lm-evaluation-harness. Multiple choice, loglikelihood "
                "and perplexity need the logits of a causal model, which YAN has not; see examples/lm_eval"
            )
        frame = frame.f_back

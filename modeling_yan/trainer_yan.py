"""What the trainers of transformers and TRL need of a YAN model: its loss terms in their logs."""

from typing import Any

import torch
from torch import distributed
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .clients_yan import refuse_prompt_learning


class RunningMeans:
    """Means of named scalars, added up on their device until they are asked for."""

    def __init__(self) -> None:
        self.totals: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, scalars: dict[str, torch.Tensor], weight: int = 1) -> None:
        for name, scalar in scalars.items():
            self.totals[name] = self.totals.get(name, 0) + weight * scalar.float()
            self.counts[name] = self.counts.get(name, 0) + weight

    def take(self) -> dict[str, float]:
        """The means since the last call, over all processes; nothing where nothing was added."""
        totals, counts = self.totals, self.counts
        self.totals, self.counts = {}, {}
        if not totals:
            return {}
        means = torch.stack([total / counts[name] for name, total in totals.items()])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(means)
            means /= distributed.get_world_size()
        return dict(zip(totals, means.tolist(), strict=True))


class YanTrainerCallback(TrainerCallback):
    """Adds the means of the model's `loss_terms` to every log of a Trainer; models without such terms are left alone.

    A training log gets the means over all forward passes since the last one. An evaluation log and the metrics of
    `evaluate` and `predict` get those over their rows, under their prefix. A Trainer of a YAN model has one by itself
    (`watch_trainers`), before its trackers, which therefore see the terms. It also takes back what Seq2SeqTrainer
    sets in the model's generation config, and tells a collator that draws at random which epoch it is. It refuses what
    a Trainer can't train.
    """

    def __init__(self) -> None:
        self.training, self.evaluation = RunningMeans(), RunningMeans()
        self.latest = None

    def _collect(self, model: Any, means: RunningMeans, by_row: bool = False) -> None:
        terms = getattr(model, "loss_terms", None)
        if terms is not None and terms is not self.latest:  # else the step made no pass with labels
            means.add(terms, model.num_loss_rows if by_row else 1)
            self.latest = terms

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if hasattr(model, "loss_terms"):
            refuse_prompt_learning(model)
            refuse_label_smoothing(args, model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = RunningMeans()

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        collator = getattr(train_dataloader, "collate_fn", None)
        collator = getattr(collator, "data_collator", collator)  # inside of what removes columns
        set_epoch = getattr(collator, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(int(state.epoch or 0))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._collect(model, self.training)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._collect(model, self.training)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._collect(model, self.evaluation, by_row=True)
        if getattr(args, "predict_with_generate", False):
            reopen_options(model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None:
            means = self.training.take() if "loss" in logs else self._evaluation_means(logs)
            logs.update(means)  # the trackers come after this callback
            state.log_history[-1].update(means)

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if metrics is not None:
            metrics.update(self._evaluation_means(metrics))

    def _evaluation_means(self, metrics: dict[str, float]) -> dict[str, float]:
        prefix = next((name.removesuffix("runtime") for name in metrics if name.endswith("_runtime")), "")
        return {prefix + name: mean for name, mean in self.evaluation.take().items()}


def reopen_options(model: Any) -> None:
    """Set the general defaults back to None that Seq2SeqTrainer has written since the model's last `generate`."""
    defaults = GenerationConfig._get_default_generation_params()
    for name in getattr(model, "open_options", ()):
        if getattr(model.generation_config, name) == defaults[name]:
            setattr(model.generation_config, name, None)


def refuse_label_smoothing(args: TrainingArguments, model: Any) -> None:
    """Raise ValueError if the Trainer would use a smoothed cross-entropy instead of the model's own loss."""
    objective = model.config.objective
    has_other_terms = hasattr(model, "flow") or objective.mmd_weight or objective.latent_norm_weight
    if args.label_smoothing_factor and has_other_terms:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor}: must be 0, because the Trainer would train the "
            "smoothed cross-entropy alone, without the model's other loss terms"
        )

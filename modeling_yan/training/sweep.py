"""A learning rate for every model: several are tried for a share of the updates, and the best one goes on."""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from ..data.rows import replacing, write_whole
from .arguments import PretrainingArguments
from .checkpoints import list_checkpoints
from .loop import LOG_FILE, pretrain

CHOICE_FILE, TRIALS_FOLDER = "learning_rates.json", "learning_rates"


def pretrain_with_best_rate(
    arguments: PretrainingArguments, learning_rates: Sequence[float], trial_share: float = 0.2
) -> float:
    """Train to `max_steps` with the best of the rates, going on from its trial, and return it.

    A run that was killed goes on with `resume`; what was chosen stays chosen.

    Args:
        learning_rates: One or more, each above 0. trial_share: Share of `max_steps` that each is tried for, in (0, 1).

    Raises:
        ValueError: Rates or a share that are not allowed, no validation file, or more than one process; or rates
            other than those that were tried in this folder.
        FloatingPointError: No rate has a finite loss.
    """
    num_trial_steps = _check(arguments, learning_rates, trial_share)
    output_dir = Path(arguments.output_dir)
    choice = choose_learning_rate(arguments, learning_rates, num_trial_steps)
    if not list_checkpoints(output_dir):
        _take_over(output_dir / TRIALS_FOLDER / f"{choice:g}", output_dir)
    _train(replace(arguments, learning_rate=choice, resume=True))
    return choice


def choose_learning_rate(
    arguments: PretrainingArguments, learning_rates: Sequence[float], num_trial_steps: int
) -> float:
    """The rate with the lowest validation loss (the mean over the tasks) after `num_trial_steps` updates.

    Every trial has the warm-up of `arguments`, then a constant rate. The losses, and the other figures of each trial's
    last validation, are written to `learning_rates.json` in `output_dir`; where that is there, it is read.
    """
    path = Path(arguments.output_dir) / CHOICE_FILE
    if path.exists():
        record = json.loads(path.read_text())
        tried = [trial["learning_rate"] for trial in record["trials"]]
        if sorted(tried) != sorted(learning_rates):
            raise ValueError(f"learning_rates={list(learning_rates)}: must be those of {path}, {tried}")
        return record["chosen"]
    trials = {rate: _try(arguments, rate, num_trial_steps) for rate in learning_rates}
    losses = {rate: _mean_loss(line) for rate, line in trials.items()}
    chosen = min(losses, key=losses.__getitem__)
    if not math.isfinite(losses[chosen]):
        raise FloatingPointError(f"learning_rates={list(learning_rates)}: no trial has a finite loss")
    # JSON has no infinity: a trial that failed has no loss
    entries = [
        {"learning_rate": rate, "loss": losses[rate] if math.isfinite(losses[rate]) else None, "validation": line}
        for rate, line in trials.items()
    ]
    record = {"stage": arguments.stage, "chosen": chosen, "updates": num_trial_steps, "trials": entries}
    write_whole(path, json.dumps(record, indent=1) + "\n")
    return chosen


def _try(arguments: PretrainingArguments, rate: float, num_steps: int) -> dict[str, float]:
    """The last validation of a trial; one whose loss is not finite has none."""
    folder = Path(arguments.output_dir) / TRIALS_FOLDER / f"{rate:g}"
    settings: dict[str, Any] = {
        "learning_rate": rate,
        "max_steps": num_steps,
        "save_steps": num_steps,
        "decay_steps": 0,
    }
    trial = replace(
        arguments, **settings, lr_scheduler_type="constant_with_warmup", output_dir=str(folder), resume=True
    )
    try:
        _train(trial)
    except FloatingPointError:
        return {}
    lines = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    return [line for line in lines if any(name.endswith("/exact") for name in line)][-1]


def _train(arguments: PretrainingArguments) -> None:
    AcceleratorState._reset_state(True)  # one state a process otherwise, with the settings of the run before
    pretrain(arguments)


def _mean_loss(line: Mapping[str, float]) -> float:
    losses = [value for name, value in line.items() if name.endswith("/loss")]
    mean = sum(losses) / len(losses) if losses else math.inf
    return mean if math.isfinite(mean) else math.inf


def _take_over(trial: Path, output_dir: Path) -> None:
    """Put the trial's log and then its checkpoint into the run's folder, the checkpoint whole or not at all."""
    shutil.copyfile(trial / LOG_FILE, output_dir / LOG_FILE)
    checkpoint = list_checkpoints(trial)[-1]
    with replacing(output_dir / checkpoint.name) as aside:
        shutil.copytree(checkpoint, aside)


def _check(arguments: PretrainingArguments, learning_rates: Sequence[float], trial_share: float) -> int:
    if not learning_rates or not all(rate > 0 for rate in learning_rates):
        raise ValueError(f"learning_rates={list(learning_rates)}: must be one or more, each above 0")
    if not 0 < trial_share < 1:
        raise ValueError(f"trial_share={trial_share}: must be above 0 and below 1")
    if not arguments.validation_file:
        raise ValueError("a learning rate is chosen by the loss on validation_file: give one")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("a learning rate is chosen in one process: start the sweep without several")
    return max(1, round(trial_share * arguments.max_steps))

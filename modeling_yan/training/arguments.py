"""The settings of a pre-training run: a dataclass, the command line, and recipe files in YAML."""

import math
import sys
from argparse import Action, ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, cast

import yaml
from transformers import HfArgumentParser
from transformers.utils import logging

from .stages import STAGES

logger = logging.get_logger(__name__)
SCHEDULES = ("constant_with_warmup", "cosine")
MIXED_PRECISIONS = ("no", "bf16", "fp16")
AT_LEAST = {  # the smallest allowed value of every number
    "max_steps": 1,
    "save_steps": 1,
    "logging_steps": 1,
    "save_total_limit": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "encoder_learning_rate": 0,
    "warmup_steps": 0,
    "decay_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "seed": 0,
    "dataloader_num_workers": 0,
    "max_words": 2,
    "dataset_rows": 0,
    "shuffle_buffer": 1,
    "bucket_batches": 1,
    "max_source_length": 1,
    "validation_batches": 1,
    "num_samples": 0,
    "peak_tflops": 0,
}


@dataclass
class PretrainingArguments:
    """Settings of one pre-training run: stage, model, rows, optimizer and logging.

    `python examples/pretrain.py --help` describes every field. Numbers have the smallest values of `AT_LEAST`.

    Raises:
        ValueError: A value that is not allowed; the message names the field, the value and what is allowed.

    Example:

        >>> from modeling_yan.training import PretrainingArguments
        >>> settings = PretrainingArguments("flow", "stage-one", "tokenizer", "stage-two", train_file=["my.jsonl.gz"])
        >>> settings.learning_rate > 0
        True
    """

    stage: str = field(
        metadata={"help": "autoencoder, then flow on its result; or a baseline", "choices": list(STAGES)}
    )
    config: str = field(
        metadata={
            "help": "a preset (trained from scratch) or a checkpoint, folder or hub name; a baseline takes its size"
        }
    )
    tokenizer: str = field(metadata={"help": "folder or hub name of a tokenizer"})
    output_dir: str = field(metadata={"help": "where checkpoints, the result and log.jsonl go"})
    config_overrides: str = field(
        default="", metadata={"help": "fields of the config to change, on top of a recipe's, such as mask_ratio=0.4"}
    )
    resize_embeddings: bool = field(
        default=False, metadata={"help": "fit a checkpoint to a tokenizer it doesn't know"}
    )
    train_file: list[str] = field(
        default_factory=list,
        metadata={"help": ".jsonl, .jsonl.gz, .txt or .parquet, rows with text or with source and target"},
    )
    dataset: list[str] = field(
        default_factory=list, metadata={"help": "data sets by name: of the registry, of the hub, or folders"}
    )
    dataset_rows: int = field(default=0, metadata={"help": "at most this many rows of each data set; 0 for all"})
    streaming: bool = field(default=False, metadata={"help": "read the rows as they are needed, from file or hub"})
    shuffle_buffer: int = field(default=10_000, metadata={"help": "rows that the shuffle of a stream holds"})
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "processes that draw and tokenise rows; 0 for the main one alone"}
    )
    bucket_batches: int = field(default=1, metadata={"help": "batches drawn together and sorted by length"})
    validation_file: list[str] = field(default_factory=list, metadata={"help": ".jsonl or .jsonl.gz"})
    max_steps: int = field(default=10_000, metadata={"help": "updates"})
    save_steps: int = field(default=1_000, metadata={"help": "updates between checkpoints, each with a validation"})
    save_total_limit: int = field(default=2, metadata={"help": "checkpoints to keep, the newest ones"})
    resume: bool = field(
        default=False, metadata={"help": "go on from the latest checkpoint in output_dir, or start if there is none"}
    )
    logging_steps: int = field(default=50, metadata={"help": "updates between lines of the log"})
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"], metadata={"help": "Accelerate's trackers, or none; beside log.jsonl"}
    )
    seed: int = 0
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    encoder_learning_rate: float | None = field(
        default=None, metadata={"help": "of a pretrained encoder; learning_rate if left out"}
    )
    lr_scheduler_type: str = field(
        default="constant_with_warmup",
        metadata={"help": "after the warm-up: constant, or a cosine to 0", "choices": list(SCHEDULES)},
    )
    warmup_steps: int = field(default=1_000, metadata={"help": "linear warm-up from 0"})
    decay_steps: int = field(
        default=0, metadata={"help": "updates at the end in which the learning rate decays linearly to 0"}
    )
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    ema_decay: float = field(
        default=0.0, metadata={"help": "keep an exponential moving average of the weights and save it; 0 for none"}
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "as the launcher says if left out", "choices": list(MIXED_PRECISIONS)}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "less memory, at the cost of a second forward pass"}
    )
    dynamo_backend: str = field(default="no", metadata={"help": "to compile the model: inductor, ..."})
    use_cpu: bool = False
    tasks: list[str] = field(default_factory=list, metadata={"help": "TASK=WEIGHT ...; equal weights if empty"})
    max_words: int = field(
        default=24, metadata={"help": "texts are cropped to whole sentences of at most this many words in all"}
    )
    max_source_length: int = field(default=64, metadata={"help": "longest source, and longest autoencoder text"})
    validation_batches: int = field(default=8, metadata={"help": "batches per task and validation"})
    num_samples: int = field(default=2, metadata={"help": "rows per task whose generated text a validation shows"})
    peak_tflops: float = field(
        default=0.0, metadata={"help": "peak of one device for the FLOPs utilisation; measured by a product if 0"}
    )

    def __post_init__(self) -> None:
        for name, low in AT_LEAST.items():
            value = getattr(self, name)
            if name == "encoder_learning_rate" and value is None:
                continue
            if not isinstance(value, Real) or isinstance(value, bool) or not low <= cast(float, value) < math.inf:
                raise ValueError(f"{name}={value!r}: must be a finite number of at least {low}")
        for name, allowed in {
            "stage": tuple(STAGES),
            "lr_scheduler_type": SCHEDULES,
            "mixed_precision": (None, *MIXED_PRECISIONS),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(map(str, allowed))}")
        for name in ("ema_decay", "adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= cast(float, value) < 1:
                raise ValueError(f"{name}={value!r}: must be at least 0 and below 1")
        decay = self.decay_steps if self.lr_scheduler_type == "constant_with_warmup" else 0
        if self.warmup_steps + decay > self.max_steps:
            steps = f"max_steps={self.max_steps} with warmup_steps={self.warmup_steps} and decay_steps={decay}"
            logger.warning(f"{steps}: the learning rate never reaches {self.learning_rate:g}. Shorten both.")

    def task_weights(self) -> dict[str, float] | None:
        """The weights of `tasks`, or None. Raises ValueError for an entry that is no TASK=WEIGHT."""
        try:
            return {name: float(weight) for name, weight in (task.split("=") for task in self.tasks)} or None
        except ValueError:
            raise ValueError(f"tasks={self.tasks}: every entry must be TASK=WEIGHT") from None


def check_given_once(words: Sequence[str]) -> None:
    """Raise ValueError if a command line has an option twice, of which the last would silently count."""
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    twice = next((option for option in options if options.count(option) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice}: must be given once; several values of one option stand behind it")


def expand_recipe(parser: ArgumentParser, words: Sequence[str] | None) -> list[str]:
    """The words of a command line, and before them those of its recipe, which they override.

    Adds `--recipe FILE` to the parser: a YAML file from names of options to values, a list for an option of several
    values, true or false for a switch. Options can no longer be abbreviated. `--config_overrides` on the command line
    adds to the recipe's, and wins where both name a field; an empty one takes them away.

    Args:
        words: `sys.argv` without the program's name if None.

    Raises:
        FileNotFoundError: There is no such file. ValueError: It is no mapping, or has a name that does not exist.
    """
    known = {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}
    parser.add_argument("--recipe", help="a YAML file of options, such as one in configuration/recipes")
    parser.allow_abbrev = False  # an abbreviated --recipe would be read and not applied
    words = list(sys.argv[1:] if words is None else words)
    check_given_once(words)
    finder = ArgumentParser(add_help=False, allow_abbrev=False)  # finds the file, wherever and however it is named
    finder.add_argument("--recipe")
    finder.add_argument("--config_overrides")
    found = finder.parse_known_args(words)[0]
    path = found.recipe
    if path is None:
        return words
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: must be YAML; {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: a recipe maps names to values, this one holds {type(recipe).__name__}")
    unknown = sorted(set(recipe) - set(known))
    if unknown:
        raise ValueError(f"{path}: no such setting as {', '.join(unknown)}; there are {', '.join(known)}")
    if found.config_overrides and recipe.get("config_overrides"):
        words += ["--config_overrides", f"{recipe['config_overrides']},{found.config_overrides}"]
    return [word for name, value in recipe.items() for word in _as_words(known[name], value)] + words


def _as_words(action: Action, value: Any) -> list[str]:
    option = f"--{action.dest}"
    if action.nargs == 0:
        return [option] if value else []
    return [option, *map(str, value if isinstance(value, list) else [value])]


def parse_arguments(
    words: Sequence[str], make_parser: Callable[..., HfArgumentParser] = HfArgumentParser
) -> PretrainingArguments:
    """Settings from the words of a command line; `--recipe FILE` gives those that the command line leaves out.

    `make_parser` makes the parser of a dataclass.
    """
    parser = make_parser(PretrainingArguments)
    arguments, _ = parser.parse_args_into_dataclasses(expand_recipe(parser, words))
    return arguments

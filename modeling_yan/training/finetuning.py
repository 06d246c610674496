"""Fine-tuning on pairs out of any columns with transformers' Seq2SeqTrainer: of a checkpoint, all of it or a LoRA
adapter, or of a new model on a pretrained encoder."""

import hashlib
import json
import math
import os
import re
import shlex
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ..cards_yan import YanModelCard
from ..configuration_yan import LORA_PARAMETERS
from ..data import FlowCollator, prepare_tokenizer, split_targets
from ..data.rows import Row
from ..data.tables import PairColumns, has_split, hold_out, load_file, load_split, make_pairs
from ..modeling_yan import YanForFlowGeneration
from .arguments import check_given_once
from .encoder_states import RowsWithStates, StatesCollator
from .models import naming
from .optimization import make_groups
from .run_folder import find_checkpoint, note_run
from .samples import METRICS, Samples

if TYPE_CHECKING:
    from peft import LoraModel

logger = logging.get_logger(__name__)


DEFAULTS: dict[str, Any] = {"logging_steps": 50, "warmup_steps": 0.05}
DEFAULTS |= {"predict_with_generate": True, "remove_unused_columns": False}
DEFAULTS |= {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 64}
DEFAULTS |= {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1}
DEFAULTS |= {"load_best_model_at_end": True, "num_train_epochs": 0}  # 0: by the number of rows
LEARNING_RATE = 1e-4  # of what is trained already
NEW_LEARNING_RATE = 3e-4  # of a new flow and decoder
UPDATES, MIN_EPOCHS, MAX_EPOCHS = 2000, 3, 20  # about this many updates, if neither epochs nor updates are given
PATIENCE = 3  # epochs
MEASURED_ROWS = 1024
SHOWN = ("eval_loss", "eval_ce_loss", "eval_exact_match", "eval_rouge_l")
LONGEST_EXAMPLE, SHORTENED = 300, 60  # characters
STATES = "_states"  # a folder that a Trainer does not push to the hub


@dataclass
class FinetuningArguments:
    """The model and its rows for `finetune`; `yan finetune --help` describes every field.

    Raises:
        ValueError: Not exactly one of `train_file` and `dataset`, or of `model` and `encoder`, is given; or options
            that do not go together.

    Example:

        >>> from modeling_yan.training.finetuning import FinetuningArguments
        >>> FinetuningArguments(train_file="pairs.csv", encoder="my-encoder").encoder_learning_rate
        0.0001
    """

    train_file: str | None = field(
        default=None, metadata={"help": "rows to train on: .jsonl, .json, .csv, .tsv or .parquet, also .gz"}
    )
    validation_file: str | None = field(default=None, metadata={"help": "held-out rows, like train_file"})
    dataset: str | None = field(
        default=None, metadata={"help": "folder or hub name of a data set, instead of train_file"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "which of the data set's configs"})
    train_split: str = field(default="train", metadata={"help": 'of the data set, such as train or "train[:10%%]"'})
    validation_split: str | None = field(
        default=None, metadata={"help": "of the data set; if not given, validation where there is one"}
    )
    validation_share: float = field(
        default=0.1, metadata={"help": "share of the rows, in (0, 1), that is held out where nothing else is"}
    )
    source_column: str = field(default="source", metadata={"help": "the column to read"})
    target_column: str = field(default="target", metadata={"help": "the column to generate"})
    template: str | None = field(
        default=None,
        metadata={"help": 'makes the source of several columns, "context: {context} question: {question}"'},
    )
    model: str | None = field(default=None, metadata={"help": "folder or hub name of a checkpoint"})
    encoder: str | None = field(
        default=None, metadata={"help": "folder or hub name of a pretrained text encoder to build a new model on"}
    )
    fields: str = field(
        default="{}", metadata={"help": 'fields of YanConfig for a new model, such as {"freeze_encoder": true}'}
    )
    encoder_learning_rate: float | None = field(
        default=None,
        metadata={"help": f"of a pretrained encoder; with --encoder {LEARNING_RATE}, else that of the others"},
    )
    lora: bool = field(
        default=False,
        metadata={
            "help": "train a LoRA adapter of the flow; with --encoder of the encoder, merged at the end (needs peft)"
        },
    )
    lora_rank: int = field(default=8, metadata={"help": "rank of LoRA's matrices; lora_alpha is twice as large"})
    cache_latents: bool = field(
        default=True,
        metadata={"help": "compute a frozen pretrained encoder's states of the training rows once, and keep them"},
    )

    def __post_init__(self) -> None:
        for one, other in (("train_file", "dataset"), ("model", "encoder")):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                raise ValueError(f"--{one}, or --{other}: must be given, and not both")
        if self.new_fields() and self.encoder is None:
            raise ValueError(f"--fields {self.fields!r}: is for a new model, on an --encoder")
        if self.encoder is not None and self.lora and self.new_fields().get("freeze_encoder"):
            raise ValueError("--lora: adapts the encoder, which freeze_encoder in --fields keeps as it is")
        if self.encoder is not None and self.encoder_learning_rate is None and not self.lora:
            self.encoder_learning_rate = LEARNING_RATE
        if self.dataset is None:
            for name in ("validation_split", "dataset_config", "train_split"):
                if getattr(self, name) not in (None, "train"):
                    raise ValueError(f"--{name}: is for --dataset; held-out rows of a file are --validation_file")
        if self.validation_split is not None and self.validation_file is not None:
            raise ValueError("--validation_split, or --validation_file: must not both be given")

    @property
    def columns(self) -> PairColumns:
        """Which columns become source and target."""
        return PairColumns(self.source_column, self.target_column, self.template)

    def new_fields(self) -> dict[str, Any]:
        """The fields of a new model. ValueError unless they are a JSON object."""
        try:
            fields = json.loads(self.fields)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise ValueError(f'--fields {self.fields!r}: must be a JSON object, such as {{"freeze_encoder": true}}')
        return fields

    @property
    def origin(self) -> str:
        """What the rows are of."""
        return self.train_file or self.dataset or ""


def parse_finetuning(
    words: Sequence[str], make_parser: Callable[..., Any] = HfArgumentParser
) -> tuple[FinetuningArguments, Seq2SeqTrainingArguments]:
    """Settings from the words of a command line; `make_parser` makes the parser of dataclasses."""
    parser = make_parser([FinetuningArguments, Seq2SeqTrainingArguments])
    parser.set_defaults(**DEFAULTS)
    check_given_once(words)
    given, _ = parser.parse_known_args(words)
    rate = LEARNING_RATE if given.encoder is None else NEW_LEARNING_RATE
    # the best model can be kept only where each is saved that is measured
    parser.set_defaults(learning_rate=rate, load_best_model_at_end=given.eval_strategy == given.save_strategy != "no")
    try:
        options, training = parser.parse_args_into_dataclasses(words)
    except ValueError as error:
        parser.error(str(error))
    for name in ("batch_eval_metrics", "dataloader_drop_last"):
        if getattr(training, name):
            parser.error(f"--{name}: must be left out, the scores are those of all held-out rows")
    for name, least in {
        "num_train_epochs": 0,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
    }.items():
        if getattr(training, name) < least:
            parser.error(f"--{name} {getattr(training, name)}: must be at least {least}")
    metric = (training.metric_for_best_model or "").removeprefix("eval_")
    if metric in METRICS and not training.predict_with_generate:
        parser.error(f"--metric_for_best_model {metric}: must go with --predict_with_generate True")
    if training.train_sampling_strategy == "group_by_length":
        parser.error("--train_sampling_strategy group_by_length: must be random or sequential, rows are read as text")
    return options, training


def finetune(options: FinetuningArguments, training: Seq2SeqTrainingArguments) -> None:
    """Fine-tune a checkpoint, or train a new model on a pretrained encoder; prints scores before and after.

    Training stops when the loss on the held-out rows has not fallen for three epochs, and the best model is kept.
    `training.output_dir` gets the model, or only its adapter with `lora` of a checkpoint.

    Args:
        options: The model and its rows.
        training: transformers' settings; with `num_train_epochs=0`, 3 to 20 epochs, near 2,000 updates if possible.

    Raises:
        ValueError: A bad column, split, field or output folder, no rows, or targets that the tokenizer cannot write.
        FileNotFoundError: No such file or data set.
        FileExistsError: `output_dir` holds a finished model, or the checkpoints of another run, and
            `resume_from_checkpoint` is not given.
    """
    checkpoint = find_checkpoint(training)
    training.restore_callback_states_from_checkpoint = checkpoint is not None  # how long the loss has not fallen
    set_seed(training.seed)
    with training.main_process_first():  # the others find what it downloaded and converted
        rows, held_out, held_name = load_pairs(options, training.seed)
    model, tokenizer = _model_and_tokenizer(options, rows, held_out)
    if not training.num_train_epochs:
        training.num_train_epochs = choose_epochs(len(rows), training)
    is_main = training.process_index == 0
    if is_main:
        print(f"{len(rows):,} rows to train on; {len(held_out):,} rows held out, {held_name}")
    collator = FlowCollator(tokenizer, model=model)
    longest = max(len(ids) for ids in _target_ids(tokenizer, [*rows, *held_out])) + 1  # with its EOS
    model.generation_config.max_new_tokens = max(longest, model.generation_config.max_new_tokens)
    note_run(training, _made_of(options, training.seed, [*rows, *held_out]), is_resumed=checkpoint is not None)
    canvases = split_targets(rows, tokenizer, model.config.canvas_length)
    held_out_canvases = [split_targets([row], tokenizer, model.config.canvas_length) for row in held_out]
    samples = None
    if training.predict_with_generate:
        samples = Samples(tokenizer, held_out, [len(parts) for parts in held_out_canvases], is_main)
    trained: PreTrainedModel = model
    adapter, output_dir, train_rows = None, cast(str, training.output_dir), cast(Any, canvases)
    if options.lora and options.encoder is not None:
        adapter = adapt_encoder(model, options.lora_rank)
    elif options.lora:
        trained = _with_lora(model, options.lora_rank)
    if options.cache_latents and model.keeps_states:
        with training.main_process_first():
            model.to(training.device)  # type: ignore[arg-type]
            train_rows = RowsWithStates(canvases, model, collator, Path(output_dir, STATES))
    trainer = Seq2SeqTrainer(
        model=trained,
        args=training,
        train_dataset=train_rows,
        eval_dataset=cast(Any, [part for parts in held_out_canvases for part in parts]),
        data_collator=StatesCollator(collator),
        processing_class=tokenizer,
        compute_metrics=samples,
        callbacks=[EarlyStoppingCallback(PATIENCE)] if training.load_best_model_at_end else None,
        optimizers=(_two_rates(trained, training, options.encoder_learning_rate), None),
    )
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=checkpoint)
    if adapter is not None:
        adapter.merge_and_unload()
    after = trainer.evaluate()
    command = next_command(output_dir, held_out)
    if trained is model:  # an adapter has peft's card
        fill_card(model.model_card, options, command, len(rows), after, len(held_out))
    trainer.save_model()
    trainer.save_metrics("eval", after)
    if is_main:
        for name in filter(before.__contains__, SHOWN):
            print(f"{name:18} {before[name]:.4f} -> {after[name]:.4f}")
        print(f"The model is in {training.output_dir}. Next:\n  {command}")


def _made_of(options: FinetuningArguments, seed: int, rows: Sequence[Row]) -> dict[str, Any]:
    """What a resumed run must have in common with the one that it goes on from, by the options' names."""
    return {
        "--seed": seed,
        "rows": hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest(),
        "--model or --encoder": Path(cast(str, options.model or options.encoder)).name,
        "--fields": options.new_fields(),
        "--lora or --lora_rank": options.lora_rank if options.lora else 0,
    }


def load_pairs(options: FinetuningArguments, seed: int) -> tuple[list[Row], list[Row], str]:
    """Rows to train on, rows held out, and where those come from.

    Raises:
        FileNotFoundError, ValueError: No such file or data set, a column or a split that is not there, or no rows.
    """
    columns, split = options.columns, options.validation_split
    if options.train_file is not None:
        rows = make_pairs(load_file(options.train_file), columns, options.train_file)
    else:
        of = cast(str, options.dataset), options.dataset_config
        rows = make_pairs(load_split(*of, options.train_split), columns, f"{options.dataset}, {options.train_split}")
        is_free = options.validation_file is None and "validation" not in re.split(r"[\[+]|\]", options.train_split)
        if split is None and is_free and has_split(*of, "validation"):
            split = "validation"
    if options.validation_file is not None:
        name = options.validation_file
        held_out, origin = make_pairs(load_file(name), columns, name), f"of {name}"
    elif split is not None:
        held_out, origin = (
            make_pairs(load_split(*of, split), columns, f"{options.dataset}, {split}"),
            f"the split {split}",
        )
    else:
        name = f"a share of {options.validation_share} cut by the seed {seed}; rows with one source stay together"
        return *hold_out(rows, options.validation_share, seed), name
    trained_on = {(row["source"], row["target"]) for row in rows}
    shared = sum((row["source"], row["target"]) in trained_on for row in held_out)
    if shared:
        logger.warning(f"{shared:,} of {len(held_out):,} held-out rows are also trained on: the scores are too good.")
    return rows, held_out, origin


def _model_and_tokenizer(
    options: FinetuningArguments, rows: Sequence[Row], held_out: Sequence[Row]
) -> tuple[YanForFlowGeneration, PreTrainedTokenizerBase]:
    if options.encoder is not None:
        return _new_model(options.encoder, rows, held_out, options.new_fields())
    name = cast(str, options.model)
    with naming("model", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name)
    if model.config.model_type != "yan":
        raise ValueError(f"--model {name!r}: its model_type={model.config.model_type!r} must be 'yan'")
    _check_texts(tokenizer, [*rows, *held_out])
    return cast(YanForFlowGeneration, model), tokenizer


def _check_texts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> None:
    """Raise ValueError if no target can be generated; warn of those that can't, and of sources that can't be read."""
    ids = [set(found) for found in _target_ids(tokenizer, rows)]
    unknown, special = {tokenizer.unk_token_id}, set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    faults = {
        "characters that the tokenizer does not know": (unknown, "choose another encoder or model"),
        "special tokens of the tokenizer": (special, "write them differently"),
    }
    for fault, (tokens, mend) in faults.items():
        found = [row["target"] for row, own in zip(rows, ids, strict=True) if own & tokens]
        if found:
            example = textwrap.shorten(found[0], SHORTENED, placeholder=" ...")
            message = f"{len(found):,} of {len(rows):,} targets have {fault}, such as {example!r}"
            if len(found) == len(rows):
                raise ValueError(f"{message}: {mend}")
            logger.warning(f"{message}: these can't be generated, and count as wrong.")
    sources = cast(Any, tokenizer([row["source"] for row in rows], add_special_tokens=False)["input_ids"])
    unread = [row["source"] for row, own in zip(rows, sources, strict=True) if unknown & set(own)]
    if unread:
        example = textwrap.shorten(unread[0], SHORTENED, placeholder=" ...")
        message = f"{len(unread):,} of {len(rows):,} sources have characters that the tokenizer does not know"
        logger.warning(f"{message}, such as {example!r}: the model can't tell these characters apart.")


def _target_ids(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[list[int]]:
    return cast(list[list[int]], tokenizer([row["target"] for row in rows], add_special_tokens=False)["input_ids"])


def _new_model(
    encoder: str, rows: Sequence[Row], held_out: Sequence[Row], fields: dict[str, Any]
) -> tuple[YanForFlowGeneration, PreTrainedTokenizerBase]:
    """A model and its tokenizer on a pretrained encoder, with room for the longest target of all rows."""
    with naming("encoder", encoder):
        tokenizer = AutoTokenizer.from_pretrained(encoder)
    prepare_tokenizer(tokenizer)
    together = [*rows, *held_out]
    _check_texts(tokenizer, together)
    targets = _target_ids(tokenizer, together)
    longest = max(range(len(targets)), key=lambda index: len(targets[index]))
    length = len(targets[longest]) + 1  # with its EOS
    try:
        model = YanForFlowGeneration.from_encoder_pretrained(
            encoder, tokenizer=tokenizer, **{"canvas_length": length, **fields}
        )
    except ValueError as error:
        if "canvas_length" in fields or f"canvas_length={length}" not in str(error):
            raise
        shorter = """shorten it, or give --fields '{"canvas_length": N}' for several canvases of N tokens"""
        target = textwrap.shorten(together[longest]["target"], SHORTENED, placeholder=" ...")
        raise ValueError(f"the target {target!r} has {length - 1} tokens: {shorter} ({error})") from error
    limits = {"max_length": model.config.max_prompt_length, "truncation": True, "padding": True}
    texts = [row["source"] for row in rows[:MEASURED_ROWS]]
    batches = (texts[start : start + 32] for start in range(0, len(texts), 32))
    model.measure_latents(tokenizer(batch, return_tensors="pt", **limits) for batch in batches)
    return model, tokenizer


def _two_rates(
    model: nn.Module, training: Seq2SeqTrainingArguments, encoder_rate: float | None
) -> torch.optim.Optimizer | None:
    """The optimizer of a pretrained encoder that learns at a rate of its own; None where the trainer makes one."""
    if encoder_rate is None:
        return None
    groups = make_groups(model, training.weight_decay, training.learning_rate, encoder_rate)
    kind, settings = Seq2SeqTrainer.get_optimizer_cls_and_kwargs(training)
    return cast(torch.optim.Optimizer, kind(groups, **settings))


def choose_epochs(num_rows: int, training: Seq2SeqTrainingArguments) -> int:
    """Epochs that make about `UPDATES` updates, over which the learning rate falls."""
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    return min(max(math.ceil(UPDATES / math.ceil(num_rows / batch)), MIN_EPOCHS), MAX_EPOCHS)


def adapt_encoder(model: YanForFlowGeneration, rank: int) -> "LoraModel":
    """Freeze a pretrained encoder and give each of its linear layers a LoRA adapter (arXiv 2106.09685).

    Flow and decoder are trained as before. `merge_and_unload` of what comes back leaves a model without adapters,
    which is saved and loaded as any other.

    Returns:
        peft's `LoraModel` around the encoder, which is changed in place.
    """
    from peft import LoraConfig, LoraModel

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return LoraModel(model.base_model.encoder, config, "default")


def _with_lora(model: YanForFlowGeneration, rank: int) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", target_parameters=LORA_PARAMETERS)
    adapted: Any = get_peft_model(model, config)
    base = adapted.peft_config["default"]
    if os.path.isdir(base.base_model_name_or_path):  # found from any folder
        base.base_model_name_or_path = os.path.abspath(base.base_model_name_or_path)
    adapted.print_trainable_parameters()
    return adapted


def next_command(folder: str | os.PathLike[str], rows: Sequence[Row]) -> str:
    """What to type next: the shortest prompt of some rows, in the form that the model was trained on."""
    prompt = min((row["source"] for row in rows), key=len)
    prompt = textwrap.shorten(prompt, LONGEST_EXAMPLE, placeholder=" ...")
    return f"yan generate {shlex.quote(str(folder))} {shlex.quote(prompt)}"


def fill_card(
    card: YanModelCard,
    options: FinetuningArguments,
    command: str,
    num_rows: int,
    scores: dict[str, Any],
    num_held_out: int,
) -> None:
    """Say in the model card what the model was trained on, how it is asked, and how well it answers."""
    columns = options.columns
    card.prompts = f"`{' '.join(columns.form.split())}`, of which it generates `{columns.target}`: `{command}`."
    card.metrics = ["exact_match", "rouge"]
    card.results = {"rows trained on": f"{num_rows:,} of {os.path.basename(options.origin)}"}
    card.results |= {
        f"{name.removeprefix('eval_')}, {num_held_out:,} held-out rows": f"{scores[name]:.4f}"
        for name in SHOWN
        if name in scores
    }
    if options.dataset is not None and not os.path.exists(options.dataset):
        card.datasets = [options.dataset]

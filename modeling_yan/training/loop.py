"""The training loop of both stages and of the baselines, killed and resumed without a trace.

Any number of processes work together through Accelerate. An update has G micro-batches: the number of processes times
accumulation steps. Each of them is a pure function of the seed, the update and its index in the update: its rows, its
noise and its number of solver steps. Each is weighed by its tokens. So the same G gives the same loss curve however it
is made up of processes and accumulation, and a resumed run goes on exactly where its checkpoint was.
"""

import contextlib
import functools
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from datasets import concatenate_datasets
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..checks_yan import IGNORE_INDEX
from ..data import load_rows, prepare_tokenizer, read_rows
from ..data.readers import find_files, read_file
from ..data.rows import SUFFIXES, replacing, write_whole
from .arguments import PretrainingArguments
from .checkpoints import (
    SETTINGS_FILE,
    claim,
    count_microbatches,
    find_checkpoint,
    hash_files,
    list_checkpoints,
    remove_old,
    write_checkpoint,
)
from .loading import load_updates, to_device
from .models import choose_attention, load_config, load_model, naming
from .optimization import MovingAverage, follow_schedule, make_optimizer
from .sampler import Batch, TaskSampler
from .stages import STAGES
from .throughput import baseline_flops, measure_peak, training_flops
from .validation import Validation
from .vocabulary import limit_prompts

STATE_FOLDER, LOG_FILE = "state", "log.jsonl"
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pretrain(arguments: PretrainingArguments) -> None:
    """Train one stage. `output_dir` gets the model, the tokenizer, checkpoints and the log.

    Args:
        arguments: The settings, as of `parse_arguments(["--recipe", "configuration/recipes/tiny-flow.yaml", ...])`.

    Raises:
        ValueError: Settings that do not fit the data, the tokenizer or the checkpoint to go on from.
        FileExistsError: `output_dir` holds the checkpoints of another run, and `resume` is off.
        FloatingPointError: The loss is not finite.
        OSError: A checkpoint could not be written; `output_dir` can't be, or another process is writing there.
    """
    accelerator = make_accelerator(arguments)
    with claim(arguments.output_dir) if accelerator.is_main_process else contextlib.nullcontext():
        _pretrain(arguments, accelerator)


def _pretrain(arguments: PretrainingArguments, accelerator: Accelerator) -> None:
    output_dir = Path(arguments.output_dir)
    checkpoint = find_checkpoint(arguments, accelerator)
    set_seed(arguments.seed)
    with naming("tokenizer", arguments.tokenizer):
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    prepare_tokenizer(tokenizer)
    with naming("config", arguments.config):
        model = load_model(
            arguments.stage, arguments.config, tokenizer, arguments.resize_embeddings, arguments.config_overrides
        )
    with accelerator.main_process_first():  # the others find what it downloaded and converted
        rows = load_training_rows(arguments, arguments.train_file, arguments.dataset)
    num_microbatches = count_microbatches(accelerator)
    is_baseline = STAGES[arguments.stage].is_baseline
    config = load_config(arguments.config, arguments.config_overrides) if is_baseline else model.config
    names = ", ".join([*arguments.train_file, *arguments.dataset])
    samplers = [
        make_sampler(arguments, rows, tokenizer, config, index, num_microbatches, names)
        for index in local_microbatches(accelerator)
    ]
    validation = None
    if arguments.validation_file:
        held_out = [row for path in find_files(arguments.validation_file) for row in read_rows(path)]
        names = ", ".join(arguments.validation_file)
        sampler = make_sampler(arguments, held_out, tokenizer, config, origin=names)
        validation = Validation(arguments, sampler, tokenizer)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    longest = arguments.max_source_length + max(config.num_vertices(config.canvas_length), config.num_answer_slots)
    choose_attention(model, accelerator.device, accelerator.mixed_precision, longest)
    training = Training(arguments, accelerator, model, tokenizer, samplers, validation)
    if checkpoint:
        training.restore(checkpoint)
    accelerator.wait_for_everyone()
    training.run(output_dir)
    accelerator.end_training()


def make_accelerator(arguments: PretrainingArguments) -> Accelerator:
    """Accelerate's state for this run; the launcher says on which devices."""
    trackers = [name for name in arguments.report_to if name != "none"]
    accelerator = Accelerator(
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        mixed_precision=arguments.mixed_precision,
        cpu=arguments.use_cpu,
        log_with=trackers or None,
        project_config=ProjectConfiguration(arguments.output_dir, logging_dir=f"{arguments.output_dir}/runs"),
        dynamo_backend=arguments.dynamo_backend,
        step_scheduler_with_optimizer=False,
    )
    unusable = set(trackers) - {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    if unusable:
        raise ValueError(
            f"report_to={arguments.report_to}: {', '.join(sorted(unusable))} is not installed; "
            "install it, or use --report_to none"
        )
    check_sharding(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it wants to know before it sees a batch
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = arguments.per_device_train_batch_size
    return accelerator


def check_sharding(accelerator: Accelerator) -> None:
    """Raise ValueError where the launcher asks for shards, and Accelerate makes whole copies, as it does on CPUs."""
    found = accelerator.distributed_type
    for wanted in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        variable = f"ACCELERATE_USE_{wanted.value}"
        is_asked = os.environ.get(variable, "").lower() == "true" and accelerator.num_processes > 1
        if is_asked and found != wanted:
            raise ValueError(
                f"{variable}=true: must be false on {accelerator.device}, where Accelerate trains by {found.value}; "
                "use configuration/accelerate/ddp.yaml"
            )


def load_training_rows(arguments: PretrainingArguments, files: list[str], names: list[str]) -> Any:
    """All rows of local files and of data sets by name: a list, one Arrow data set, or one stream.

    Raises:
        ValueError: There is nothing to load, or streams and lists would have to be mixed.
    """
    if not files and not names:
        raise ValueError("nothing to train on: give train_file or dataset")
    files = list(map(str, find_files(files)))
    is_plain = not names and not arguments.streaming and all(path.endswith(SUFFIXES) for path in files)
    if is_plain:
        return [row for path in files for row in read_rows(path)]
    options = {"streaming": arguments.streaming, "seed": arguments.seed}
    parts = [load_rows(name, num_rows=arguments.dataset_rows or None, **options) for name in names]
    kinds: dict[bool, list[str]] = {}
    for file in files:
        _, first = next(read_file(Path(file)))
        kinds.setdefault(isinstance(first, dict) and "target" in first, []).append(file)
    parts += [load_rows(group, **options) for group in kinds.values()]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def make_sampler(
    arguments: PretrainingArguments,
    rows: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    microbatch_index: int = 0,
    num_microbatches: int = 1,
    origin: str = "the rows",
) -> TaskSampler:
    """The micro-batches of one index in every update; `origin` names the rows in errors."""
    return TaskSampler(
        rows,
        tokenizer,
        config,
        arguments.stage,
        batch_size=arguments.per_device_train_batch_size,
        length=arguments.max_steps,
        seed=arguments.seed,
        weights=arguments.task_weights(),
        max_words=arguments.max_words,
        max_source_length=arguments.max_source_length,
        process_index=microbatch_index,
        num_processes=num_microbatches,
        bucket_batches=arguments.bucket_batches,
        shuffle_buffer=arguments.shuffle_buffer,
        origin=origin,
    )


def local_microbatches(accelerator: Accelerator) -> range:
    """Indices of the micro-batches of an update that this process works on."""
    return range(accelerator.process_index, count_microbatches(accelerator), accelerator.num_processes)


def count_targets(batch: Batch) -> int:
    """Tokens that the loss of a batch is a mean over: the labels, or the whole canvas with its fill."""
    if "canvas_length" in batch:
        return len(batch["labels"]) * batch["canvas_length"]
    return int((batch["labels"] != IGNORE_INDEX).sum())


class Meter:
    """Means of the loss terms since the last line of the log, weighted by tokens, over all processes."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.reset()

    def reset(self) -> None:
        """Begin a new line."""
        self.sums: dict[str, torch.Tensor] = {}
        self.notes: dict[str, list[float]] = {}
        self.num_targets = self.num_tokens = self.flops = 0
        self.started = time.perf_counter()

    def add(self, outputs: Any, num_targets: int, num_tokens: int, flops: int) -> None:
        """Take in one micro-batch; nothing leaves the device."""
        for name, value in outputs.items():
            if name.endswith(("loss", "entropy", "dim", "usage", "information")):
                self.sums[name] = self.sums.get(name, 0) + value.detach().float() * num_targets
        self.num_targets += num_targets
        self.num_tokens += num_tokens
        self.flops += flops

    def note(self, name: str, value: float) -> None:
        """Take in a number that is the same on all processes, once an update."""
        self.notes.setdefault(name, []).append(value)

    def means(self, peak: float) -> dict[str, float]:
        """The terms, tokens per second of all processes, and the share of all devices' peak, since the last call."""
        counts = torch.tensor([self.num_targets, self.num_tokens, self.flops], dtype=torch.float64)
        sums = {name: value.double() for name, value in self.sums.items()}
        reduced = self.accelerator.reduce([counts.to(self.accelerator.device), sums], "sum")
        (num_targets, num_tokens, flops), sums = reduced[0].tolist(), reduced[1]
        seconds, processes = time.perf_counter() - self.started, self.accelerator.num_processes
        line = {name: sum(values) / len(values) for name, values in self.notes.items()}
        for name, value in sums.items():
            values = (value / num_targets).reshape(-1).tolist()
            line |= {name: values[0]} if value.dim() == 0 else {f"{name}/{k}": share for k, share in enumerate(values)}
        self.reset()
        return {**line, "tokens_per_second": num_tokens / seconds, "mfu": flops / (seconds * peak * processes)}


class Training:
    """One run: model, optimizer and data, and the loop over them."""

    def __init__(
        self,
        arguments: PretrainingArguments,
        accelerator: Accelerator,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        samplers: list[TaskSampler],
        validation: Validation | None = None,
    ) -> None:
        self.arguments, self.accelerator, self.tokenizer = arguments, accelerator, tokenizer
        self.stage, self.samplers, self.validation = STAGES[arguments.stage], samplers, validation
        self.config = model.config
        optimizer, self.scheduler = make_optimizer(arguments, model)
        # The scheduler stays unprepared: Accelerate would step it once per process and update.
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.average = MovingAverage(self.model, arguments.ema_decay) if arguments.ema_decay else None
        accelerator.register_for_checkpointing(self.scheduler)
        self.step, self.seconds, self.meter = 0, 0.0, Meter(accelerator)
        self._unread: list[torch.Tensor] = []  # loss and norm of the gradient, on the device, of each update since

    def run(self, output_dir: Path) -> None:
        """Train to `max_steps`, with a log line, a validation and a checkpoint every so often; export the result."""
        arguments = self.arguments
        self.progress = tqdm(
            total=arguments.max_steps, initial=self.step, disable=not self.accelerator.is_main_process, mininterval=2
        )
        self.peak = 1e12 * arguments.peak_tflops or measure_peak(
            self.accelerator.device, DTYPES[self.accelerator.mixed_precision]
        )
        self.accelerator.init_trackers("tracking", config=_flat(asdict(arguments)))
        self.model.train()
        self.meter.reset()
        started = time.perf_counter() - self.seconds
        for batches in self._updates():
            self._update(batches)
            self.step += 1
            self.progress.update()
            is_last = self.step == arguments.max_steps
            is_logged, is_saved = self.step % arguments.logging_steps == 0, self.step % arguments.save_steps == 0
            if is_logged or is_saved or is_last:
                self._read_losses()
            if is_logged or is_last:
                self.seconds = time.perf_counter() - started
                rate = self.scheduler.get_last_lr()[0]
                counts = self._count_rows()
                self._log({"seconds": self.seconds, "learning_rate": rate, **self.meter.means(self.peak), **counts})
            if is_saved or is_last:
                self._validate()
                self._save(output_dir)
                self.meter.reset()
        self.progress.close()
        self._export(output_dir)

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of this run; what the log says of later updates is taken out."""
        self.accelerator.load_state(checkpoint / STATE_FOLDER)
        follow_schedule(self.scheduler)
        if self.average:
            path = self._average_file(checkpoint / STATE_FOLDER)
            self.average.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        settings = json.loads((checkpoint / SETTINGS_FILE).read_text())
        self.step, self.seconds = settings["step"], settings["seconds"]
        if self.accelerator.is_main_process:
            _cut_log(Path(self.arguments.output_dir) / LOG_FILE, self.step)

    def _updates(self) -> Iterator[tuple[Batch, ...]]:
        """The micro-batches of this process, update by update."""
        updates = load_updates(self.samplers, self.step, self.arguments.dataloader_num_workers)
        return (tuple(map(self._inputs, batches)) for batches in updates)

    def _inputs(self, batch: Batch) -> Batch:
        """The batch in the layout that the model takes."""
        return self.stage.inputs(batch, self.tokenizer.pad_token_id)

    def _count_rows(self) -> dict[str, int]:
        """What the data did not fit since this process began: rows left out, sources and targets cut."""
        names = {"skipped_rows": "num_skipped", "cut_sources": "num_truncated", "cut_targets": "num_cut_targets"}
        counts = {name: sum(getattr(sampler, field) for sampler in self.samplers) for name, field in names.items()}
        return {name: int(count) for name, count in counts.items() if count}

    def _update(self, batches: Sequence[Batch]) -> None:
        """Forward and backward passes of one update's micro-batches, then the optimizer's step."""
        counts = [count_targets(batch) for batch in batches]
        total = self.accelerator.reduce(torch.tensor(float(sum(counts)), device=self.accelerator.device), "sum")
        losses = []
        for index, batch, count in zip(local_microbatches(self.accelerator), batches, counts, strict=True):
            with self.accelerator.accumulate(self.model):
                # Accelerate takes the mean over accumulation steps and processes: together the mean over all tokens.
                loss = self._forward(index, batch, count) * (count * count_microbatches(self.accelerator) / total)
                self.accelerator.backward(loss)
                losses.append(loss.detach())
                if self.accelerator.sync_gradients:
                    self._clip(sum(losses))
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.scheduler.step()
        if self.average:
            self.average.update()

    def _forward(self, microbatch_index: int, batch: Batch, count: int) -> torch.Tensor:
        """Loss of a micro-batch of this update, a pure function of weights, seed, update and index."""
        seed, settings = self.arguments.seed, {}
        if self.stage.has_flow:  # the same for all processes, or sharded weights would wait for each other
            low, high = self.config.objective.min_train_flow_steps, self.config.objective.max_train_flow_steps
            settings["num_flow_steps"] = random.Random(f"{seed} steps {self.step}").randint(low, high)
        torch.manual_seed(random.Random(f"{seed} noise {self.step} {microbatch_index}").getrandbits(63))
        outputs = self.model(**to_device(batch, self.accelerator.device), **settings)
        target_width = batch.get("canvas_length", 0)
        if self.accelerator.unwrap_model(self.model).config.is_encoder_decoder:
            target_width = batch["labels"].shape[1]
        num_tokens = int(batch["attention_mask"].sum()) + count * (target_width > 0)
        shape = (*batch["input_ids"].shape, target_width, *settings.values())
        self.meter.add(outputs, count, num_tokens, self._flops(*shape))
        return outputs.loss

    @functools.cache  # noqa: B019  one object for the whole run
    def _flops(self, *shape: Any) -> int:
        count = baseline_flops if self.stage.is_baseline else training_flops
        return count(self.accelerator.unwrap_model(self.model), *shape)

    def _clip(self, loss: torch.Tensor) -> None:
        """Clip the gradient; what it and the loss were stays on the device, or every update would wait for it."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        norm = torch.as_tensor(0.0 if norm is None else norm, device=loss.device)
        self._unread.append(torch.stack([loss.float(), norm.float()]))

    def _read_losses(self) -> None:
        """Take in the updates since the last look. Nothing was logged or saved of them yet.

        Raises:
            FloatingPointError: The loss of one of them is not finite, or its gradient.
        """
        may_overflow = self.accelerator.scaler is not None  # then the scaler leaves the update out
        first = self.step - len(self._unread) + 1
        for step, (loss, norm) in enumerate(torch.stack(self._unread).tolist(), start=first):
            if not (math.isfinite(loss) and (may_overflow or math.isfinite(norm))):
                raise FloatingPointError(
                    f"update {step}: the loss is {loss}, the norm of its gradient {norm}; "
                    "nothing was saved since the last checkpoint, which is the last good state"
                )
            self.meter.note("grad_norm", norm)
        self._unread.clear()

    def _averaged(self) -> AbstractContextManager[None]:
        return self.average.applied() if self.average else contextlib.nullcontext()

    def _validate(self) -> None:
        if self.validation is None:
            return
        with self._averaged():
            line, samples = self.validation.run(self.model, self.accelerator)
        self._log(line)
        if samples and self.accelerator.is_main_process:
            self.progress.write(samples.as_table())
            samples.append_to(Path(self.arguments.output_dir) / "samples.jsonl", self.step)
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.writer.add_text("samples", samples.as_table(), self.step)

    def _log(self, line: dict[str, Any]) -> None:
        """One line to the terminal, to log.jsonl and to the trackers."""
        self.accelerator.log(line, step=self.step)
        if not self.accelerator.is_main_process:
            return
        line = {"step": self.step, **line}
        line = {name: round(value, 5) if isinstance(value, float) else value for name, value in line.items()}
        self.progress.write(" ".join(f"{name} {value}" for name, value in line.items()))
        with open(Path(self.arguments.output_dir) / LOG_FILE, "a") as log:
            log.write(json.dumps(line) + "\n")

    def _save(self, output_dir: Path) -> None:
        write_checkpoint(self.accelerator, output_dir, self.step, self._write)
        if self.accelerator.is_main_process:
            remove_old(output_dir, self.arguments.save_total_limit)

    def _write(self, folder: Path) -> None:
        """What a checkpoint holds, from every process."""
        self.accelerator.save_state(folder / STATE_FOLDER)
        is_main = self.accelerator.is_main_process
        if self.average and (is_main or self._is_sharded()):
            torch.save(self.average.state_dict(), self._average_file(folder / STATE_FOLDER))
        with self._averaged():  # what get_state_dict gives may be the weights themselves, not a copy
            weights = self.accelerator.get_state_dict(self.model)
            weights = {name.removeprefix("_orig_mod."): value for name, value in weights.items()}  # if compiled
            if is_main:
                model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
                model.save_pretrained(folder, state_dict=weights)
        if not is_main:
            return
        limit_prompts(self.tokenizer, model.config)
        self.tokenizer.save_pretrained(folder)
        state = {"step": self.step, "seconds": self.seconds, "num_microbatches": count_microbatches(self.accelerator)}
        settings = asdict(self.arguments) | state | {"train_file_hash": hash_files(self.arguments.train_file)}
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    def _is_sharded(self) -> bool:
        return self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    def _average_file(self, folder: Path) -> Path:
        return folder / f"average_{self.accelerator.process_index if self._is_sharded() else 0}.pt"

    def _export(self, output_dir: Path) -> None:
        """Put model and tokenizer of the last checkpoint into the folder itself, one rename a file."""
        if not self.accelerator.is_main_process:
            return
        for path in list_checkpoints(output_dir)[-1].iterdir():
            if path.is_file():
                with replacing(output_dir / path.name) as aside:
                    shutil.copyfile(path, aside)


def _cut_log(path: Path, step: int) -> None:
    """Keep the lines of the first `step` updates, or the log would tell some of them twice."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    write_whole(path, "".join(line for line in lines if json.loads(line)["step"] <= step))


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: " ".join(value) if isinstance(value, list) else value for name, value in settings.items()}

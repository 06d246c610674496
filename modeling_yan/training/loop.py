"""The training loop of both stages: any number of processes through Accelerate, one JSON line of losses at a time."""

import json
import os
import random
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration_yan import YanConfig
from ..data import read_rows
from ..modeling_yan import YanForAutoencoding, YanForFlowGeneration
from .mixture import TaskMixture

STAGES = {"autoencoder": YanForAutoencoding, "flow": YanForFlowGeneration}


@dataclass
class PretrainingArguments:
    """What to train on what, and how."""

    stage: str = field(metadata={"help": "autoencoder, then flow on its result", "choices": list(STAGES)})
    config: str = field(metadata={"help": "folder of a preset (trained from scratch) or of a checkpoint"})
    tokenizer: str = field(metadata={"help": "folder or hub name of a tokenizer with pad, EOS and mask tokens"})
    train_file: list[str] = field(metadata={"help": ".jsonl or .jsonl.gz, rows with text or with source and target"})
    output_dir: str = field(metadata={"help": "where checkpoints, the result and log.jsonl go"})
    validation_file: list[str] = field(default_factory=list, metadata={"help": "like train_file"})
    max_steps: int = field(default=10_000, metadata={"help": "updates"})
    save_steps: int = field(default=1_000, metadata={"help": "updates between validations and saves"})
    logging_steps: int = field(default=50, metadata={"help": "updates between lines of the log"})
    seed: int = 0
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = field(default=1_000, metadata={"help": "linear warm-up from 0"})
    decay_steps: int = field(default=0, metadata={"help": "linear decay to 0 over the last so many updates"})
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    use_cpu: bool = False
    tasks: list[str] = field(default_factory=list, metadata={"help": "TASK=WEIGHT ...; equal weights if empty"})
    max_words: int = field(default=24, metadata={"help": "texts are cropped to sentences of so many words in all"})
    max_source_length: int = field(default=64, metadata={"help": "longest source, and longest autoencoder text"})
    validation_batches: int = field(default=8, metadata={"help": "batches per task and validation"})

    def task_weights(self) -> dict[str, float] | None:
        """The weights of `tasks`, or None. Raises ValueError for an entry that is no TASK=WEIGHT."""
        try:
            return {name: float(weight) for name, weight in (task.split("=") for task in self.tasks)} or None
        except ValueError:
            raise ValueError(f"tasks={self.tasks}: every entry must be TASK=WEIGHT") from None


def pretrain(arguments: PretrainingArguments) -> None:
    """Train one stage and save model and tokenizer in `output_dir`."""
    accelerator = Accelerator(
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        mixed_precision=arguments.mixed_precision,
        cpu=arguments.use_cpu,
    )
    set_seed(arguments.seed, device_specific=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    model = load_model(arguments.stage, arguments.config, tokenizer)
    mixture = make_mixture(arguments, arguments.train_file, tokenizer, model.config, accelerator.process_index)
    validation = None
    if arguments.validation_file:
        validation = make_mixture(arguments, arguments.validation_file, tokenizer, model.config)
    optimizer, scheduler = make_optimizer(arguments, model)
    # The scheduler stays unprepared: Accelerate would step it once per process and update.
    model, optimizer = accelerator.prepare(model, optimizer)
    Training(arguments, accelerator, model, tokenizer, optimizer, scheduler, mixture, validation).run()
    accelerator.end_training()


def load_model(stage: str, folder: str, tokenizer):
    """The stage's model: weights of a checkpoint folder, or a fresh one of a preset, fitted to the tokenizer.

    Raises:
        ValueError: The tokenizer lacks a special token, or does not fit the checkpoint.
    """
    for name in ("pad_token_id", "eos_token_id", "mask_token_id"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"the tokenizer has no {name}: add the token before training")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "mask")}
    config = YanConfig.from_pretrained(folder)
    if not any((Path(folder) / name).exists() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        config.update({"vocab_size": len(tokenizer), **special})
        return STAGES[stage](config)
    differing = {name: value for name, value in special.items() if getattr(config, name) != value}
    if len(tokenizer) > config.vocab_size or differing:
        raise ValueError(
            f"the tokenizer with {len(tokenizer)} tokens and {special} does not fit the checkpoint {folder} with "
            f"vocab_size={config.vocab_size} and { {name: getattr(config, name) for name in special} }"
        )
    return STAGES[stage].from_pretrained(folder)


def make_mixture(arguments, files, tokenizer, config, process_index=0) -> TaskMixture:
    """The batches of `files` that this process trains or validates on."""
    return TaskMixture(
        [row for path in files for row in read_rows(path)],
        tokenizer,
        config,
        arguments.stage,
        batch_size=arguments.per_device_train_batch_size,
        length=arguments.max_steps * arguments.gradient_accumulation_steps,
        seed=arguments.seed,
        weights=arguments.task_weights(),
        max_words=arguments.max_words,
        max_source_length=arguments.max_source_length,
        process_index=process_index,
    )


def make_optimizer(arguments, model):
    """AdamW without decay on biases, norms and embeddings; linear warm-up, constant, linear decay at the end."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    is_decayed = {name: parameter.dim() > 1 and "embeddings" not in name for name, parameter in trained}
    groups = [
        {"params": [p for name, p in trained if is_decayed[name]], "weight_decay": arguments.weight_decay},
        {"params": [p for name, p in trained if not is_decayed[name]], "weight_decay": 0.0},
    ]
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=betas)

    def factor(step):
        warm = (step + 1) / max(1, arguments.warmup_steps)
        left = (arguments.max_steps - step) / max(1, arguments.decay_steps)
        return min(1.0, warm, left)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def mean_terms(lines: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each term over the lines that have it."""
    values = {name: [line[name] for line in lines if name in line] for line in lines for name in line}
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


@dataclass
class Training:
    """One run: model and data, and the loop over them."""

    arguments: PretrainingArguments
    accelerator: Accelerator
    model: torch.nn.Module
    tokenizer: object
    optimizer: object
    scheduler: object
    mixture: TaskMixture
    validation: TaskMixture | None

    def run(self):
        """Train to `max_steps`, with a log line, a validation and a save every so often."""
        output_dir = Path(self.arguments.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        progress = tqdm(total=self.arguments.max_steps, disable=not self.accelerator.is_main_process, mininterval=2)
        step, lines, started = 0, [], time.perf_counter()
        self.model.train()
        for batch in DataLoader(self.mixture, batch_size=None):
            lines.append(self._update(batch))
            if not self.accelerator.sync_gradients:
                continue
            step += 1
            progress.update()
            if step % self.arguments.logging_steps == 0 or step == self.arguments.max_steps:
                self._log({"step": step, "seconds": time.perf_counter() - started, **mean_terms(lines)}, progress)
                lines = []
            if step % self.arguments.save_steps == 0 or step == self.arguments.max_steps:
                self._log({"step": step, **self._validate()}, progress)
                self._save(output_dir, step)
        progress.close()

    def _update(self, batch):
        """One forward and backward pass; one optimizer step when the accumulation is full. Returns the terms."""
        with self.accelerator.accumulate(self.model):
            outputs = self.model(**self._to_device(batch))
            if not torch.isfinite(outputs.loss):
                raise FloatingPointError(
                    f"the loss is {outputs.loss.item()}: the last checkpoint is the last good one"
                )
            self.accelerator.backward(outputs.loss)
            terms = {
                name: value.item() for name, value in outputs.items() if name.endswith(("loss", "entropy", "dim"))
            }
            if self.accelerator.sync_gradients:
                norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
                terms["grad_norm"] = float(norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.scheduler.step()
        return {"learning_rate": self.scheduler.get_last_lr()[0], **terms}

    def _to_device(self, batch):
        device = self.accelerator.device
        return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Per task: mean loss, share of target tokens restored, and share of rows restored whole."""
        if self.validation is None or not self.accelerator.is_main_process:
            return {}
        self.model.eval()
        results = {}
        for task in self.validation.weights:
            rng, scores = random.Random(f"validation {self.arguments.seed}"), []
            for _ in range(self.arguments.validation_batches):
                batch = self._to_device(self.validation.batch(task, rng))
                outputs = self.accelerator.unwrap_model(self.model)(**batch)
                is_target = batch["labels"] != -100
                is_right = outputs.logits.argmax(-1) == batch["labels"]
                tokens = is_right[is_target].float().mean()
                scores.append([outputs.loss, tokens, (is_right | ~is_target).all(1).float().mean()])
            means = torch.tensor(scores).mean(0).tolist()
            results |= dict(zip([f"{task}/loss", f"{task}/tokens", f"{task}/exact"], means, strict=True))
        self.model.train()
        return results

    def _log(self, line, progress):
        if not self.accelerator.is_main_process:
            return
        line = {name: round(value, 5) if isinstance(value, float) else value for name, value in line.items()}
        progress.write(" ".join(f"{name} {value}" for name, value in line.items()))
        with open(Path(self.arguments.output_dir) / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")

    def _save(self, output_dir, step):
        """Write model, tokenizer and arguments beside the old ones, then replace them one rename a file."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        aside = output_dir / f".unfinished-{step}"
        self.accelerator.unwrap_model(self.model).save_pretrained(aside)
        self.tokenizer.save_pretrained(aside)
        (aside / "training_arguments.json").write_text(json.dumps({**asdict(self.arguments), "step": step}, indent=2))
        for path in aside.iterdir():
            os.replace(path, output_dir / path.name)
        shutil.rmtree(aside)

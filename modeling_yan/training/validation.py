"""What a run shows of itself on held-out data: losses, restored tokens, and samples of generated text."""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..baselines import write_targets
from ..checks_yan import IGNORE_INDEX
from .arguments import PretrainingArguments
from .sampler import TaskSampler
from .stages import STAGES

CELL_WIDTH = 60  # characters of a text in the printed table


@dataclass
class Sample:
    """One held-out row and what the model generated."""

    task: str
    source: str
    target: str
    prediction: str


class Samples(list[Sample]):
    """Samples of one validation."""

    def as_table(self) -> str:
        """A table in Markdown, long texts cut to their ends."""
        rows = [[sample.task, *map(_cell, (sample.source, sample.target, sample.prediction))] for sample in self]
        lines = [["task", "source", "target", "prediction"], ["---"] * 4, *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def append_to(self, path: Path, step: int) -> None:
        """Add one JSON object a sample to a file."""
        with path.open("a") as file:
            file.writelines(json.dumps({"step": step, **asdict(sample)}, ensure_ascii=False) + "\n" for sample in self)


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= CELL_WIDTH else "…" + text[1 - CELL_WIDTH :]


class Validation:
    """The same held-out batches at every call, and the first rows of each task written out."""

    def __init__(
        self, arguments: PretrainingArguments, sampler: TaskSampler, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.arguments, self.sampler, self.tokenizer = arguments, sampler, tokenizer
        self.stage = STAGES[arguments.stage]

    @torch.no_grad()
    def run(self, model: nn.Module, accelerator: Accelerator) -> tuple[dict[str, float], Samples]:
        """Per task: mean loss, share of target tokens restored, share of rows restored whole; and samples.

        A baseline's tokens are those that it generates by itself. Every call draws the same noise. Every process does
        the same, because sharded weights need all of them; those give no samples from `generate`.
        """
        model.eval()
        torch.manual_seed(self.arguments.seed)  # an update seeds itself
        samples = Samples()
        line: dict[str, float] = {}
        is_sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        for task in self.sampler.weights:
            rng, scores = random.Random(f"validation {self.arguments.seed}"), []
            for index in range(self.arguments.validation_batches):
                batch = {
                    name: value.to(accelerator.device) if torch.is_tensor(value) else value
                    for name, value in self.sampler.batch(task, rng).items()
                }
                loss, predictions = self._predict(model, accelerator.unwrap_model(model), batch, is_sharded)
                scores.append(_scores(loss, predictions, batch["labels"]))
                if index == 0 and not is_sharded:
                    samples += self._samples(task, accelerator.unwrap_model(model), batch, predictions)
            means = torch.tensor(scores).mean(0).tolist()
            line |= dict(zip([f"{task}/loss", f"{task}/tokens", f"{task}/exact"], means, strict=True))
        model.train()
        return line, samples

    def _predict(
        self, model: nn.Module, unwrapped: Any, batch: dict[str, Any], is_sharded: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, and the token ids (B, L) that are held against the labels."""
        if not self.stage.is_baseline:
            outputs = model(**batch)
            if self.stage.has_flow and not is_sharded:  # sharded weights are whole inside of forward alone
                return outputs.loss, unwrapped.most_likely(outputs.logits, outputs.latents)
            return outputs.loss, outputs.logits.argmax(-1)
        loss = model(**self.stage.inputs(batch, self.tokenizer.pad_token_id)).loss
        return loss, write_targets(unwrapped, batch)

    def _samples(self, task: str, model: Any, batch: dict[str, Any], predictions: torch.Tensor) -> list[Sample]:
        count = self.arguments.num_samples
        batch = {name: value[:count] if torch.is_tensor(value) else value for name, value in batch.items()}
        labels, sources = batch["labels"], batch["input_ids"]
        if count == 0:
            return []
        if self.stage.has_flow:
            canvas_length = batch["canvas_length"]
            settings = {"max_new_tokens": canvas_length, "canvas_length": canvas_length, "return_prompt": False}
            predictions = model.generate(sources, attention_mask=batch["attention_mask"], do_sample=False, **settings)
        else:
            predictions = torch.where(labels == IGNORE_INDEX, labels, predictions[:count])
        texts = zip(sources, labels, predictions, strict=True)
        return [Sample(task, self._text(source, True), self._text(y), self._text(y_hat)) for source, y, y_hat in texts]

    def _text(self, ids: torch.Tensor, with_masks: bool = False) -> str:
        """The ids without what is ignored and without special tokens; masks are shown where they are the gaps."""
        special = set(self.tokenizer.all_special_ids) - ({self.tokenizer.mask_token_id} if with_masks else set())
        return str(self.tokenizer.decode([token for token in ids.tolist() if token >= 0 and token not in special]))


def _scores(loss: torch.Tensor, predictions: torch.Tensor, labels: torch.Tensor) -> list[float]:
    is_target = labels != IGNORE_INDEX
    is_right = predictions == labels
    tokens = is_right[is_target].float().mean()
    return [float(loss), float(tokens), float((is_right | ~is_target).all(1).float().mean())]

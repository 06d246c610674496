"""Arms of `tasks.py` on a pretrained encoder: YAN, one pass, an AR encoder-decoder, and a head that classifies.

They are trained by the same updates of as many rows as the other arms. An arm has `encoder: true` in its recipe, which
names the encoder.
"""

import random
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.baselines import count_parameters
from modeling_yan.baselines.sizes import fit_width
from modeling_yan.data import FlowCollator, prepare_tokenizer, read_rows
from modeling_yan.data.rows import replacing
from modeling_yan.training import PretrainingArguments
from modeling_yan.training.finetuning import adapt_encoder

ONE_PASS_JOINT, CLASSIFIER = "one pass, joint", "classifier"
MEASURED_ROWS = 1024
BATCH_SIZE = 32


def start_model(encoder: str, fields: dict, kind: str, rows: list[dict], folder: Path, seed: int = 0):
    """Leave a new model on the encoder, with measured latents, and its tokenizer in a folder.

    One pass has the layers and parameters of YAN's flow in its decoder, and answers in mask tokens before the prompt.
    """
    if folder.exists():
        return
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    prepare_tokenizer(tokenizer)
    model = YanForFlowGeneration.from_encoder_pretrained(encoder, tokenizer=tokenizer, **fields)
    if kind == ONE_PASS_JOINT:
        fields = one_pass_fields(model.config, fields)
        model = YanForFlowGeneration.from_encoder_pretrained(encoder, tokenizer=tokenizer, **fields)
    limits = {"max_length": model.config.max_prompt_length, "truncation": True, "padding": True}
    texts = [row["source"] for row in rows[:MEASURED_ROWS]]
    batches = (texts[start : start + BATCH_SIZE] for start in range(0, len(texts), BATCH_SIZE))
    model.measure_latents(tokenizer(batch, return_tensors="pt", **limits) for batch in batches)
    with replacing(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


def one_pass_fields(config: YanConfig, fields: dict) -> dict:
    """The fields of an arm whose decoder has the layers and parameters of a YAN's flow besides, and no flow to ask."""
    layers = config.num_flow_layers + config.num_decoder_layers
    fields = {**fields, "num_answer_slots": config.canvas_length, "num_decoder_layers": layers, "num_flow_layers": 1}
    fields |= {"num_flow_steps": 0, "min_train_flow_steps": 0, "max_train_flow_steps": 0}

    def used(width: int):
        model = YanForFlowGeneration(config.with_fields(**fields, intermediate_size=width))
        del model.flow
        return model

    return {**fields, "intermediate_size": fit_width(used, count_parameters(config), "one pass")}


def train_classifier(encoder: str, train_file: str, recipe: dict, settings: dict, seed: int, folder: Path):
    """Train the encoder with transformers' own head on the targets as classes, and leave both in a folder."""
    if folder.exists():
        return
    torch.manual_seed(seed)
    rows, tokenizer = read_rows(train_file), AutoTokenizer.from_pretrained(encoder, truncation_side="left")
    labels = {name: number for number, name in enumerate(sorted({row["target"] for row in rows}))}
    rows = draw_rows(rows, recipe, seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=len(labels), label2id=labels, id2label={number: name for name, number in labels.items()}
    )
    length = recipe["training"]["max_source_length"]
    sources = tokenizer([row["source"] for row in rows], truncation=True, max_length=length)["input_ids"]
    data = [{"input_ids": ids, "label": labels[row["target"]]} for ids, row in zip(sources, rows, strict=True)]
    arguments = trainer_arguments(recipe, settings, seed, folder)
    trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), data, processing_class=tokenizer)
    trainer.train()
    save_whole(trainer, folder)


def train_adapter(start: Path, train_file: str, recipe: dict, settings: dict, rank: int, seed: int, folder: Path):
    """Train the YAN of a folder with a LoRA adapter of its encoder, and leave it merged in another folder."""
    if folder.exists():
        return
    torch.manual_seed(seed)
    model, tokenizer = YanForFlowGeneration.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    adapter = adapt_encoder(model, rank)
    collator = FlowCollator(tokenizer, model=model, max_source_length=recipe["training"]["max_source_length"])
    arguments = trainer_arguments(recipe, settings, seed, folder)
    rows = draw_rows(read_rows(train_file), recipe, seed)
    trainer = Trainer(model, arguments, collator, rows, processing_class=tokenizer)
    trainer.train()
    adapter.merge_and_unload()
    save_whole(trainer, folder)


def save_whole(trainer: Trainer, folder: Path):
    """Leave model and tokenizer in a folder that is whole or not there: one that is there counts as trained."""
    with replacing(folder) as aside:
        trainer.save_model(str(aside))


def draw_rows(rows: list[dict], recipe: dict, seed: int) -> list[dict]:
    """As many rows as the recipe's updates take, drawn with replacement, as pre-training draws those of other arms."""
    return random.Random(seed).choices(rows, k=recipe["updates"] * recipe["batch_size"])


def trainer_arguments(recipe: dict, settings: dict, seed: int, folder: Path) -> TrainingArguments:
    """The recipe's updates for transformers' Trainer, with the schedule and weight decay of pre-training."""
    return TrainingArguments(
        str(folder.with_name("run")),
        max_steps=recipe["updates"],
        per_device_train_batch_size=recipe["batch_size"],
        learning_rate=settings["learning_rate"],
        warmup_steps=recipe["training"]["warmup_steps"],
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": recipe["updates"] // 2, "decay_type": "linear"},
        weight_decay=PretrainingArguments.weight_decay,
        bf16=recipe["training"].get("mixed_precision") == "bf16",
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        seed=seed,
        use_cpu=True,
    )


@torch.no_grad()
def classify(folder: Path, sources: list[str], length: int) -> list[str]:
    """The name of the most probable class of every source."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left")
    found = []
    for start in range(0, len(sources), BATCH_SIZE):
        batch = sources[start : start + BATCH_SIZE]
        inputs = tokenizer(batch, truncation=True, max_length=length, padding=True, return_tensors="pt")
        found += [model.config.id2label[int(number)] for number in model(**inputs).logits.argmax(-1)]
    return found


def mean_by(names: list[str], values: list[float]) -> dict[str, float]:
    """The mean of the values of each name."""
    return {name: float(np.mean([v for n, v in zip(names, values) if n == name])) for name in sorted(set(names))}

"""Fine-tuning on rows of source and target with transformers' Seq2SeqTrainer: of a checkpoint, all of it or a LoRA
adapter, or of a new model on a pretrained encoder."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from ..data import FlowCollator, prepare_tokenizer, read_rows
from ..evaluation import exact_match, rouge_l
from ..modeling_yan import YanForFlowGeneration

DEFAULTS = {"max_steps": 20, "logging_steps": 5, "learning_rate": 1e-4, "predict_with_generate": True}
DEFAULTS |= {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 64, "remove_unused_columns": False}
# A new flow and decoder need more updates than a trained one.
NEW_DEFAULTS = {
    "max_steps": -1,
    "num_train_epochs": 20,
    "logging_steps": 50,
    "learning_rate": 3e-4,
    "warmup_steps": 50,
}
NEW_DEFAULTS |= {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1}
NEW_DEFAULTS |= {"load_best_model_at_end": True}
PATIENCE = 3  # epochs
MEASURED_ROWS = 1024
SHOWN = ("eval_loss", "eval_ce_loss", "eval_exact_match", "eval_rouge_l")


@dataclass
class FinetuningArguments:
    """The model and its rows."""

    train_file: str = field(metadata={"help": "rows of source and target, .jsonl or .jsonl.gz"})
    validation_file: str = field(metadata={"help": "like train_file"})
    model: str | None = field(default=None, metadata={"help": "folder or hub name of a checkpoint"})
    encoder: str | None = field(
        default=None, metadata={"help": "folder or hub name of a pretrained text encoder to build a new model on"}
    )
    fields: str = field(
        default="{}", metadata={"help": 'fields of YanConfig for a new model, such as {"freeze_encoder": true}'}
    )
    lora: bool = field(default=False, metadata={"help": "train a LoRA adapter of the flow (needs peft)"})
    lora_rank: int = 8


def parse_finetuning(
    words: Sequence[str], make_parser: Callable = HfArgumentParser
) -> tuple[FinetuningArguments, Seq2SeqTrainingArguments]:
    """Settings from the words of a command line; `make_parser` makes the parser of dataclasses."""
    parser = make_parser([FinetuningArguments, Seq2SeqTrainingArguments])
    is_new = any(word.split("=")[0] == "--encoder" for word in words)
    parser.set_defaults(**(DEFAULTS | NEW_DEFAULTS if is_new else DEFAULTS))
    options, training = parser.parse_args_into_dataclasses(words)
    if (options.model is None) == (options.encoder is None):
        parser.error("--model, or --encoder for a new model: must be given, and not both")
    if options.encoder is not None and options.lora:
        parser.error("--lora: is for a trained flow, with --encoder there is none")
    return options, training


def finetune(options: FinetuningArguments, training: Seq2SeqTrainingArguments):
    """Train and save the model, or its adapter alone, and print its scores before and after.

    A new model is trained until its loss on the held-out rows has not fallen for three epochs; the best one is kept.
    """
    rows = read_rows(options.train_file)
    if options.encoder is None:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model)
    else:
        model, tokenizer = _new_model(options.encoder, rows, json.loads(options.fields))
    trainer = Seq2SeqTrainer(
        model=_with_lora(model, options.lora_rank) if options.lora else model,
        args=training,
        train_dataset=rows,
        eval_dataset=read_rows(options.validation_file),
        data_collator=FlowCollator(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=_score_with(tokenizer),
        callbacks=[EarlyStoppingCallback(PATIENCE)] if training.load_best_model_at_end else None,
    )
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    after = trainer.evaluate()
    if not options.lora:  # an adapter has peft's card
        model.model_card.metrics = ["exact_match", "rouge"]
        model.model_card.results = {
            f"{name.removeprefix('eval_')}, {len(trainer.eval_dataset)} held-out rows": f"{after[name]:.4f}"
            for name in SHOWN
        }
    trainer.save_model()
    trainer.save_metrics("eval", after)
    for name in SHOWN:
        print(f"{name:18} {before[name]:.4f} -> {after[name]:.4f}")


def _new_model(encoder, rows, fields):
    """A model and its tokenizer on a pretrained encoder, with room for the longest target of the rows."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    prepare_tokenizer(tokenizer)
    targets = tokenizer([row["target"] for row in rows], add_special_tokens=False)["input_ids"]
    fields = {"canvas_length": max(map(len, targets)) + 1, **fields}  # with its EOS
    model = YanForFlowGeneration.from_encoder_pretrained(encoder, tokenizer=tokenizer, **fields)
    limits = {"max_length": model.config.max_prompt_length, "truncation": True, "padding": True}
    texts = [row["source"] for row in rows[:MEASURED_ROWS]]
    batches = (texts[start : start + 32] for start in range(0, len(texts), 32))
    model.measure_latents(tokenizer(batch, return_tensors="pt", **limits) for batch in batches)
    return model, tokenizer


def _with_lora(model, rank):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    return model


def _score_with(tokenizer):
    """Function from the trainer's predictions to the mean exact match and ROUGE-L of the answers."""

    def decode(ids):
        return tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    def score(prediction):
        pairs = list(zip(decode(prediction.predictions), decode(prediction.label_ids), strict=True))
        metrics = {"exact_match": exact_match, "rouge_l": rouge_l}
        return {name: float(np.mean([metric(*pair) for pair in pairs])) for name, metric in metrics.items()}

    return score

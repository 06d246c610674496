"""Fine-tuning on rows of source and target with transformers' Seq2SeqTrainer, of all weights or of a LoRA adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from ..data import FlowCollator, read_rows
from ..evaluation import exact_match, rouge_l

# Attention, Mamba and feed-forward layers and the experts of the flow; encoder and decoder stay as they are.
LORA_MODULES = (
    r"flow\.(layers|experts)\..*\.(q_proj|k_proj|v_proj|o_proj|in_proj|x_proj|dt_proj|out_proj|up_proj|down_proj)"
)
DEFAULTS = {"max_steps": 20, "logging_steps": 5, "learning_rate": 1e-4, "predict_with_generate": True}
DEFAULTS |= {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 64, "remove_unused_columns": False}
SHOWN = ("eval_loss", "eval_ce_loss", "eval_exact_match", "eval_rouge_l")


@dataclass
class FinetuningArguments:
    """The model and its rows."""

    model: str = field(metadata={"help": "folder or hub name of a checkpoint"})
    train_file: str = field(metadata={"help": "rows of source and target, .jsonl or .jsonl.gz"})
    validation_file: str = field(metadata={"help": "like train_file"})
    lora: bool = field(default=False, metadata={"help": "train a LoRA adapter of the flow (needs peft)"})
    lora_rank: int = 8


def parse_finetuning(
    words: Sequence[str], make_parser: Callable = HfArgumentParser
) -> tuple[FinetuningArguments, Seq2SeqTrainingArguments]:
    """Settings from the words of a command line; `make_parser` makes the parser of dataclasses."""
    parser = make_parser([FinetuningArguments, Seq2SeqTrainingArguments])
    parser.set_defaults(**DEFAULTS)
    return parser.parse_args_into_dataclasses(words)


def finetune(options: FinetuningArguments, training: Seq2SeqTrainingArguments):
    """Train and save the model, or its adapter alone, and print its scores before and after."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    trainer = Seq2SeqTrainer(
        model=_with_lora(model, options.lora_rank) if options.lora else model,
        args=training,
        train_dataset=read_rows(options.train_file),
        eval_dataset=read_rows(options.validation_file),
        data_collator=FlowCollator(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=_score_with(tokenizer),
    )
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    after = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("eval", after)
    for name in SHOWN:
        print(f"{name:18} {before[name]:.4f} -> {after[name]:.4f}")


def _with_lora(model, rank):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_MODULES, task_type="CAUSAL_LM")
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

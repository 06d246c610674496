"""Fine-tune a checkpoint on pairs of source and target with transformers' Seq2SeqTrainer, all of it or a LoRA adapter.

python examples/finetune.py --train_file pairs.jsonl --validation_file held-out.jsonl --output_dir finetuned --lora

Rows are JSON objects with the strings source and target. Every option of Seq2SeqTrainingArguments can be given.
"""

import sys
from pathlib import Path

import modeling_yan  # noqa: F401  registers the classes
from modeling_yan.training.finetuning import finetune, parse_finetuning

CHECKPOINT = Path(__file__).parent / "checkpoints" / "yan-transformer-tiny"


if __name__ == "__main__":
    finetune(*parse_finetuning(["--model", str(CHECKPOINT), *sys.argv[1:]]))

"""Fine-tune a checkpoint, or a new model on a pretrained encoder, on pairs of source and target.

python examples/finetune.py --train_file pairs.jsonl --validation_file held-out.jsonl --output_dir finetuned --lora
python examples/finetune.py --train_file ... --validation_file ... --output_dir new --encoder distilbert-base-uncased

Rows are JSON objects with the strings source and target. transformers' Seq2SeqTrainer trains all of the model or a
LoRA adapter; every option of Seq2SeqTrainingArguments can be given. With an encoder the run ends when the loss on the
held-out rows has not fallen for three epochs, and keeps the best one.
"""

import sys
from pathlib import Path

import modeling_yan  # noqa: F401  registers the classes
from modeling_yan.training.finetuning import finetune, parse_finetuning

CHECKPOINT = Path(__file__).parent / "checkpoints" / "yan-transformer-tiny"


if __name__ == "__main__":
    is_new = any(word.split("=")[0] in ("--encoder", "--model") for word in sys.argv)
    finetune(*parse_finetuning(sys.argv[1:] if is_new else ["--model", str(CHECKPOINT), *sys.argv[1:]]))

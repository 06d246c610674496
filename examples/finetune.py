"""Fine-tune a checkpoint, or make a new model on a pretrained encoder, out of any file or data set of pairs.

python examples/finetune.py --train_file pairs.csv --source_column question --target_column answer --output_dir tuned
python examples/finetune.py --train_file ... --output_dir new --encoder distilbert-base-uncased
python examples/finetune.py --dataset NAME --template "context: {context} question: {question}" --output_dir ...

transformers' Seq2SeqTrainer trains all of the model or a LoRA adapter; every option of Seq2SeqTrainingArguments can be
given. A tenth of the rows is held out unless others are named. The run ends when the loss on them has not fallen for
three epochs, and keeps the best model.
"""

import sys
from pathlib import Path

import modeling_yan  # noqa: F401  registers the classes
from modeling_yan.training.finetuning import finetune, parse_finetuning

CHECKPOINT = Path(__file__).parent / "checkpoints" / "yan-transformer-tiny"


if __name__ == "__main__":
    is_new = any(word.split("=")[0] in ("--encoder", "--model") for word in sys.argv)
    finetune(*parse_finetuning(sys.argv[1:] if is_new else ["--model", str(CHECKPOINT), *sys.argv[1:]]))

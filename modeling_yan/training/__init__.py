"""Two-stage pre-training through Accelerate."""

from .arguments import PretrainingArguments, parse_arguments
from .loop import pretrain
from .vocabulary import fit_to_tokenizer

__all__ = ["PretrainingArguments", "fit_to_tokenizer", "parse_arguments", "pretrain"]

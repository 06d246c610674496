"""Two-stage pre-training through Accelerate."""

from .loop import PretrainingArguments, pretrain
from .vocabulary import fit_to_tokenizer

__all__ = ["PretrainingArguments", "fit_to_tokenizer", "pretrain"]

"""Two-stage pre-training through Accelerate."""

from .loop import PretrainingArguments, pretrain

__all__ = ["PretrainingArguments", "pretrain"]

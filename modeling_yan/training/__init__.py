"""Two-stage pre-training through Accelerate."""

from .arguments import PretrainingArguments, parse_arguments
from .loop import pretrain

__all__ = ["PretrainingArguments", "parse_arguments", "pretrain"]

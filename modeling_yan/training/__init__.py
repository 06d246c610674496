"""Two-stage pre-training, and the training of baselines, through Accelerate."""

from .arguments import PretrainingArguments, expand_recipe, parse_arguments
from .loop import pretrain
from .sweep import choose_learning_rate, pretrain_with_best_rate
from .vocabulary import fit_to_tokenizer

__all__ = [
    "PretrainingArguments",
    "choose_learning_rate",
    "expand_recipe",
    "fit_to_tokenizer",
    "parse_arguments",
    "pretrain",
    "pretrain_with_best_rate",
]

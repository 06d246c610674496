"""Measuring what a checkpoint can do, beside trivial baselines."""

from .metrics import exact_match, masked_words_restored, mean_with_interval, rouge_l
from .runs import generate_answers

__all__ = ["exact_match", "generate_answers", "masked_words_restored", "mean_with_interval", "rouge_l"]

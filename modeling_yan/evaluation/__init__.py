"""Measuring what a checkpoint can do: metrics, statistics, and running a model over rows of source and target."""

from .diversity import distinct_n, repetition_rates, self_bleu, unigram_entropies
from .embeddings import TextEncoder, bert_scores, mauve_score, mean_pairwise_distance, semantic_distances
from .likelihood import generative_perplexity
from .metrics import (
    accuracy_scores,
    exact_match,
    exact_match_scores,
    masked_words_restored,
    normalize_answer,
    rouge_l,
    rouge_scores,
    token_f1_scores,
    unicode_words,
)
from .modules import METRICS, load_metric
from .reports import DEFAULT_METRICS, METRIC_NAMES, compare_runs, evaluate_task, format_report, read_predictions
from .runs import Run, RunOptions, generate_answers, generate_timed, run_model
from .speed import num_new_tokens, tokens_per_second
from .statistics import (
    mcnemar_exact,
    mean_and_deviation,
    mean_with_interval,
    paired_bootstrap,
    paired_permutation_test,
)

__all__ = [
    "mean_with_interval",
    "METRICS",
    "generate_answers",
    "repetition_rates",
    "evaluate_task",
    "Run",
    "semantic_distances",
    "token_f1_scores",
    "mcnemar_exact",
    "distinct_n",
    "mean_pairwise_distance",
    "bert_scores",
    "generate_timed",
    "masked_words_restored",
    "format_report",
    "read_predictions",
    "unigram_entropies",
    "exact_match",
    "accuracy_scores",
    "rouge_scores",
    "tokens_per_second",
    "METRIC_NAMES",
    "mauve_score",
    "paired_permutation_test",
    "DEFAULT_METRICS",
    "load_metric",
    "RunOptions",
    "num_new_tokens",
    "compare_runs",
    "run_model",
    "self_bleu",
    "exact_match_scores",
    "generative_perplexity",
    "unicode_words",
    "mean_and_deviation",
    "paired_bootstrap",
    "rouge_l",
    "TextEncoder",
    "normalize_answer",
]

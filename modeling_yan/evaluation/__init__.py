"""Measuring what a checkpoint can do: metrics, statistics, and running a model over rows of source and target.

Begin with `evaluate_task`, which writes files of scores, or with `generate_answers` and `exact_match`.
"""

from .diversity import distinct_n, repetition_rates, self_bleu, unigram_entropies
from .embeddings import TextEncoder, bert_scores, mauve_score, mean_pairwise_distance, semantic_distances
from .geometry import (
    effective_dimension,
    explained_variance,
    mean_cosine,
    mixture_likelihoods,
    usage_by_class,
    usage_information,
)
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
from .reports import (
    DEFAULT_METRICS,
    METRIC_NAMES,
    compare_runs,
    evaluate_task,
    format_report,
    read_predictions,
)
from .runs import Run, RunOptions, generate_answers, generate_timed, load_for_generation, run_model
from .speed import num_new_tokens, tokens_per_second
from .statistics import (
    mcnemar_exact,
    mean_and_deviation,
    mean_with_interval,
    paired_bootstrap,
    paired_permutation_test,
)
from .tables import evaluate_models, format_table
from .timing import format_timings, time_generation

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "METRIC_NAMES",
    "Run",
    "RunOptions",
    "TextEncoder",
    "accuracy_scores",
    "bert_scores",
    "compare_runs",
    "distinct_n",
    "effective_dimension",
    "evaluate_models",
    "evaluate_task",
    "exact_match",
    "exact_match_scores",
    "explained_variance",
    "format_report",
    "format_table",
    "format_timings",
    "generate_answers",
    "generate_timed",
    "generative_perplexity",
    "load_for_generation",
    "load_metric",
    "masked_words_restored",
    "mauve_score",
    "mcnemar_exact",
    "mean_and_deviation",
    "mean_cosine",
    "mean_pairwise_distance",
    "mean_with_interval",
    "mixture_likelihoods",
    "normalize_answer",
    "num_new_tokens",
    "paired_bootstrap",
    "paired_permutation_test",
    "read_predictions",
    "repetition_rates",
    "rouge_l",
    "rouge_scores",
    "run_model",
    "self_bleu",
    "semantic_distances",
    "time_generation",
    "token_f1_scores",
    "tokens_per_second",
    "unicode_words",
    "unigram_entropies",
    "usage_by_class",
    "usage_information",
]

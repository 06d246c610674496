"""Intervals and paired tests for scores of rows. All that is random comes from `seed`: same input, same output.

The resampling and the binomial test are scipy's; rows are checked here.
"""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Numbers = Sequence[float] | npt.NDArray[Any]
NUMBERS_AT_ONCE = 2**20  # resampled numbers held at a time, 8 MiB


class PairedComparison(NamedTuple):
    """Mean of `a - b` over the rows, its 95% interval, and the two-sided p-value of "there is no difference"."""

    difference: float
    low: float
    high: float
    p_value: float


def mean_with_interval(
    scores: Numbers,
    seed: int = 0,
    num_resamples: int = 1000,
    weights: Numbers | None = None,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Mean of the scores (N,) and its percentile bootstrap interval (low, high) over resampled rows.

    Args:
        weights: (N,), above 0: the mean and every resampled mean are weighted by them, as a perplexity is by tokens.
        confidence: Share of the resampled means inside the interval, in (0, 1).

    Raises:
        ImportError: scipy is not installed.
        ValueError: No scores, a score that is not finite, weights of another length or not above 0, or an option out
            of range.
    """
    _check_options(num_resamples, confidence)
    scores = _finite(scores, "scores")
    weights = np.ones_like(scores) if weights is None else _finite(weights, "weights")
    _check_same_length(scores=scores, weights=weights)
    if (weights <= 0).any():
        raise ValueError(f"weights: the smallest is {weights.min()}, must be above 0")
    low, high = _resample(scores, weights, seed, num_resamples, confidence).confidence_interval
    return float(_mean(scores * weights, weights)), float(low), float(high)


def mean_and_deviation(values: Numbers) -> tuple[float, float | None]:
    """Mean and sample standard deviation (divisor n - 1) of one figure per seed; the deviation of a single is None.

    Raises:
        ValueError: No values, or one that is not finite.
    """
    values = _finite(values, "values")
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None


def paired_bootstrap(a: Numbers, b: Numbers, seed: int = 0, num_resamples: int = 10_000) -> PairedComparison:
    """Compare two systems on the same rows by resampling the rows' differences `a - b`, each (N,).

    The p-value is twice the share of resampled means on the far side of zero, zero included, at most 1; one is added
    to both counts, so that it is never 0.

    Raises:
        ValueError: Lengths that differ, no rows, or a score that is not finite.
    """
    _check_options(num_resamples)
    differences = _differences(a, b)
    resampled = _resample(differences, np.ones_like(differences), seed, num_resamples, 0.95)
    (low, high), means = resampled.confidence_interval, resampled.bootstrap_distribution
    far_side = min((means <= 0).sum(), (means >= 0).sum())
    p_value = min(1.0, 2 * (1 + int(far_side)) / (1 + num_resamples))
    return PairedComparison(float(differences.mean()), float(low), float(high), p_value)


def paired_permutation_test(a: Numbers, b: Numbers, seed: int = 0, num_resamples: int = 10_000) -> float:
    """Two-sided p-value of the mean of `a - b`, each (N,), when every row's difference may as well be the negative.

    Exact, over all 2^k signs of the k differences that are not 0, where these are at most `num_resamples`; else over
    `num_resamples` random ones, with one added to both counts.

    Raises:
        ValueError: Lengths that differ, no rows, or a score that is not finite.
    """
    _check_options(num_resamples)
    differences = _differences(a, b)
    differences = differences[differences != 0]
    if len(differences) < 2:
        return 1.0
    differences /= np.abs(differences).sum()
    options = {"vectorized": True, "n_resamples": num_resamples, "alternative": "greater"}
    if 2 ** len(differences) <= num_resamples:
        # of one sample, scipy permutes the signs
        every_sign = import_stats().permutation_test((differences,), _size, permutation_type="samples", **options)
        return float(every_sign.pvalue)
    rng, batch = np.random.default_rng(seed), _batch(len(differences))

    def draw(size: tuple[int, ...]) -> Array:
        return differences * (1 - 2 * rng.integers(2, size=size, dtype=np.int8))

    return float(import_stats().monte_carlo_test(differences, draw, _size, batch=batch, **options).pvalue)


def mcnemar_exact(a: Numbers, b: Numbers) -> float:
    """Two-sided p-value for two systems' right (1) and wrong (0) rows: McNemar's test with the binomial distribution.

    Only rows that exactly one of the two gets right count; without any the p-value is 1.

    Raises:
        ValueError: Lengths that differ, no rows, or a score other than 0 and 1.
    """
    a, b = _finite(a, "a"), _finite(b, "b")
    _check_same_length(a=a, b=b)
    for name, scores in (("a", a), ("b", b)):
        wrong = scores[~np.isin(scores, (0, 1))]
        if len(wrong):
            raise ValueError(f"{name} holds {wrong[0]}: must be 0 or 1")
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    return float(import_stats().binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def import_stats() -> ModuleType:
    """`scipy.stats`; raises ImportError, saying what to install, where it is missing."""
    try:
        return import_module("scipy.stats")
    except ImportError as error:
        raise ImportError("intervals and tests need scipy: pip install scipy") from error


def _resample(scores: Array, weights: Array, seed: int, num_resamples: int, confidence: float) -> Any:
    """scipy's result for the weighted mean of rows drawn with replacement."""
    if len(scores) == 1:  # scipy wants two rows; a row beside itself has the same mean
        scores, weights = np.repeat(scores, 2), np.repeat(weights, 2)
    return import_stats().bootstrap(
        (scores * weights, weights),
        _mean,
        paired=True,
        vectorized=True,
        n_resamples=num_resamples,
        batch=_batch(len(scores)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )


def _mean(totals: Array, weights: Array, axis: int = -1) -> Any:
    return totals.sum(axis) / weights.sum(axis)


def _size(differences: Array, axis: int = -1) -> Any:
    """The sums' distance from 0, rounded: the same numbers added in another order count as equal."""
    return np.abs(differences.sum(axis)).round(12)


def _batch(width: int) -> int:
    """How many resamples of this many rows fit into memory at a time."""
    return max(1, NUMBERS_AT_ONCE // width)


def _differences(a: Numbers, b: Numbers) -> Array:
    first, second = _finite(a, "a"), _finite(b, "b")
    _check_same_length(a=first, b=second)
    return first - second


def _finite(values: Numbers, name: str) -> Array:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) == 0:
        raise ValueError(f"{name} of shape {numbers.shape}: must be one number a row, and at least one")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name}: {int((~np.isfinite(numbers)).sum())} of {len(numbers)} are not finite")
    return numbers


def _check_same_length(**columns: Array) -> None:
    (name, first), (other, second) = columns.items()
    if len(first) != len(second):
        raise ValueError(f"{name} has {len(first)} rows and {other} {len(second)}: must be equal")


def _check_options(num_resamples: int, confidence: float = 0.95) -> None:
    if num_resamples < 1:
        raise ValueError(f"num_resamples={num_resamples}: must be at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must be in (0, 1)")

"""Intervals and paired tests for scores of rows. All that is random comes from `seed`: same input, same output."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

NUMBERS_AT_ONCE = 2**22  # resampled numbers held at a time, 32 MiB


class PairedComparison(NamedTuple):
    """Mean of `a - b` over the rows, its 95% interval, and the two-sided p-value of "there is no difference"."""

    difference: float
    low: float
    high: float
    p_value: float


def mean_with_interval(
    scores: Sequence[float],
    seed: int = 0,
    num_resamples: int = 1000,
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Mean of the scores (N,) and its percentile bootstrap interval (low, high) over resampled rows.

    Args:
        weights: (N,), above 0: the mean and every resampled mean are weighted by them, as a perplexity is by tokens.
        confidence: Share of the resampled means inside the interval, in (0, 1).

    Raises:
        ValueError: No scores, a score that is not finite, weights of another length or not above 0, or an option out
            of range.
    """
    _check_options(num_resamples, confidence)
    scores = _finite(scores, "scores")
    weights = np.ones_like(scores) if weights is None else _finite(weights, "weights")
    _check_same_length(scores=scores, weights=weights)
    if (weights <= 0).any():
        raise ValueError(f"weights: the smallest is {weights.min()}, must be above 0")
    means = _resampled_means(scores, weights, seed, num_resamples)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float((scores * weights).sum() / weights.sum()), float(low), float(high)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (divisor n - 1) of one figure per seed; the deviation of a single is None.

    Raises:
        ValueError: No values, or one that is not finite.
    """
    values = _finite(values, "values")
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], seed: int = 0, num_resamples: int = 10_000
) -> PairedComparison:
    """Compare two systems on the same rows by resampling the rows' differences `a - b`, each (N,).

    The p-value is twice the share of resampled means on the far side of zero, zero included, at most 1; one is added
    to both counts, so that it is never 0.

    Raises:
        ValueError: Lengths that differ, no rows, or a score that is not finite.
    """
    _check_options(num_resamples)
    differences = _differences(a, b)
    means = _resampled_means(differences, np.ones_like(differences), seed, num_resamples)
    low, high = np.quantile(means, [0.025, 0.975])
    far_side = min((means <= 0).sum(), (means >= 0).sum())
    p_value = min(1.0, 2 * (1 + int(far_side)) / (1 + num_resamples))
    return PairedComparison(float(differences.mean()), float(low), float(high), p_value)


def paired_permutation_test(
    a: Sequence[float], b: Sequence[float], seed: int = 0, num_resamples: int = 10_000
) -> float:
    """Two-sided p-value of the mean of `a - b`, each (N,), when every row's difference may as well be the negative.

    Exact, over all 2^k signs of the k differences that are not 0, where these are at most `num_resamples`; else over
    `num_resamples` random ones, with one added to both counts.

    Raises:
        ValueError: Lengths that differ, no rows, or a score that is not finite.
    """
    _check_options(num_resamples)
    differences = _differences(a, b)
    differences = differences[differences != 0]
    if len(differences) == 0:
        return 1.0
    is_exact = len(differences) < 63 and 2 ** len(differences) <= num_resamples
    num_signs = 2 ** len(differences) if is_exact else num_resamples
    signs = _all_signs if is_exact else _random_signs(seed)
    observed = abs(differences.sum()) - 1e-12 * np.abs(differences).sum()  # sums in another order count as equal
    extreme = sum(
        int((np.abs(signs(chunk, len(differences)) @ differences) >= observed).sum())
        for chunk in _chunks(num_signs, len(differences))
    )
    return extreme / num_signs if is_exact else (1 + extreme) / (1 + num_signs)


def mcnemar_exact(a: Sequence[float], b: Sequence[float]) -> float:
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
    total = only_a + only_b
    tail = sum(math.comb(total, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**total)


def _resampled_means(scores, weights, seed, num_resamples):
    """Weighted means (num_resamples,) of rows drawn with replacement."""
    rng, totals, means = np.random.default_rng(seed), scores * weights, []
    for chunk in _chunks(num_resamples, len(scores)):
        chosen = rng.integers(len(scores), size=(len(chunk), len(scores)))
        means.append(totals[chosen].sum(1) / weights[chosen].sum(1))
    return np.concatenate(means)


def _chunks(total: int, width: int) -> Iterator[range]:
    """`range(total)` in pieces of which `width` numbers each fit into memory."""
    size = max(1, NUMBERS_AT_ONCE // width)
    return (range(start, min(start + size, total)) for start in range(0, total, size))


def _all_signs(chunk: range, width: int) -> np.ndarray:
    """The sign patterns whose numbers are in `chunk`, one a row: bit k of the number is the sign of column k."""
    return 1 - 2 * ((np.arange(chunk.start, chunk.stop)[:, None] >> np.arange(width)) & 1)


def _random_signs(seed: int) -> Callable[[range, int], np.ndarray]:
    rng = np.random.default_rng(seed)
    return lambda chunk, width: 1 - 2 * rng.integers(2, size=(len(chunk), width))


def _differences(a, b):
    a, b = _finite(a, "a"), _finite(b, "b")
    _check_same_length(a=a, b=b)
    return a - b


def _finite(values, name):
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} of shape {values.shape}: must be one number a row, and at least one")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: {int((~np.isfinite(values)).sum())} of {len(values)} are not finite")
    return values


def _check_same_length(**columns):
    (name, first), (other, second) = columns.items()
    if len(first) != len(second):
        raise ValueError(f"{name} has {len(first)} rows and {other} {len(second)}: must be equal")


def _check_options(num_resamples, confidence=0.95):
    if num_resamples < 1:
        raise ValueError(f"num_resamples={num_resamples}: must be at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must be in (0, 1)")

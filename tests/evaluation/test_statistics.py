"""Intervals and tests against analytic values, full enumeration and hand-computed p-values."""

import itertools
import math
import random

import numpy as np
import pytest

from modeling_yan.evaluation import (
    mcnemar_exact,
    mean_and_deviation,
    mean_with_interval,
    paired_bootstrap,
    paired_permutation_test,
    statistics,
)


@pytest.fixture
def scores():
    return np.random.default_rng(0).normal(1.0, 2.0, size=2000)


def test_the_interval_is_the_normal_one_where_the_mean_is_normal(scores):
    mean, low, high = mean_with_interval(scores, num_resamples=4000)
    error = scores.std() / math.sqrt(len(scores))
    assert mean == pytest.approx(scores.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.1 * error)


def test_a_smaller_confidence_gives_the_normal_interval_of_that_confidence(scores):
    _, low, high = mean_with_interval(scores, num_resamples=4000, confidence=0.5)
    assert (high - low) / 2 == pytest.approx(0.6745 * scores.std() / math.sqrt(len(scores)), rel=0.05)


def test_the_interval_is_that_of_all_possible_resamples():
    scores = [0.0, 1.0, 5.0]
    means = [sum(chosen) / 3 for chosen in itertools.product(scores, repeat=3)]
    _, low, high = mean_with_interval(scores, num_resamples=20_000, confidence=0.8)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.1, 0.9])), abs=1e-9)


def test_whole_weights_count_a_score_as_often(scores):
    weights = np.random.default_rng(1).integers(1, 4, size=len(scores))
    mean, low, high = mean_with_interval(scores, weights=weights)
    assert mean == pytest.approx(np.repeat(scores, weights).mean())
    # the error of a ratio of two means, to first order
    error = np.std(weights * (scores - mean)) / weights.mean() / math.sqrt(len(scores))
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_the_interval_depends_on_the_seed_alone_and_not_on_how_much_fits_into_memory(scores, monkeypatch):
    first = mean_with_interval(scores, seed=3)
    assert first == mean_with_interval(list(scores), seed=3)
    assert first != mean_with_interval(scores, seed=4)
    monkeypatch.setattr(statistics, "NUMBERS_AT_ONCE", 3 * len(scores))
    assert first == pytest.approx(mean_with_interval(scores, seed=3))


def test_the_interval_of_a_seed_is_that_of_numpys_draws(scores):
    """Published intervals come again: version 0.2 drew and cut them off like this."""
    drawn = scores[np.random.default_rng(3).integers(len(scores), size=(1000, len(scores)))].mean(1)
    assert mean_with_interval(scores, seed=3)[1:] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), rel=1e-12)


def test_one_score_is_its_own_interval():
    assert mean_with_interval([0.25]) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": []}, "shape"),
        ({"scores": [1.0, float("nan")]}, "1 of 2 are not finite"),
        ({"scores": [1.0], "weights": [1.0, 2.0]}, "scores has 1 rows and weights 2"),
        ({"scores": [1.0], "weights": [0.0]}, "must be above 0"),
        ({"scores": [1.0], "confidence": 1.0}, "confidence=1.0"),
        ({"scores": [1.0], "num_resamples": 0}, "num_resamples=0"),
    ],
)
def test_what_has_no_interval_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mean_with_interval(**arguments)


def test_mean_and_deviation_over_seeds():
    assert mean_and_deviation([1.0, 3.0, 5.0]) == (3.0, 2.0)
    assert mean_and_deviation([7.0]) == (7.0, None)


def test_paired_bootstrap_gives_the_normal_interval_and_p_value_of_the_differences():
    rng = np.random.default_rng(0)
    base = rng.normal(size=1000)
    other = base + rng.normal(0.05, 1.0, size=1000)
    result = paired_bootstrap(other, base, num_resamples=20_000)
    differences = other - base
    error = differences.std() / math.sqrt(1000)
    assert result.difference == pytest.approx(differences.mean())
    assert (result.low, result.high) == pytest.approx(
        (differences.mean() - 1.96 * error, differences.mean() + 1.96 * error), abs=0.1 * error
    )
    z = abs(differences.mean()) / error
    assert result.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.1)


def test_paired_bootstrap_is_antisymmetric_and_sees_no_difference_where_there_is_none():
    a, b = [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]
    forth, back = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert forth.difference == -back.difference == 0.5
    assert (forth.low, forth.high) == (-back.high, -back.low)
    assert forth.p_value == back.p_value
    assert paired_bootstrap(a, a) == (0.0, 0.0, 0.0, 1.0)


def test_a_difference_in_every_row_has_the_smallest_p_value_there_is():
    assert paired_bootstrap([1.0] * 20, [0.0] * 20, num_resamples=999).p_value == 2 / 1000


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 1, 1], [0, 0, 0], 2 / 8),
        ([3, 0], [0, 1], 1.0),  # |±3 ± 1| >= 2 in all four cases
        ([3, 2, 0], [0, 0, 1], 4 / 8),  # 3 + 2 - 1 = 4; of the eight sums 6, 4, 2, 0 and their negatives four reach it
        ([0.1, 0.2, 0.3], [0.0, 0.0, 0.0], 2 / 8),
        ([0.1, 0.2, 0, 0], [0, 0, 0.1, 0.2], 1.0),  # its 0 is 6e-17, and that of other signs is 0
        ([1, 5, 5], [0, 5, 5], 1.0),
        ([2, 2], [2, 2], 1.0),
    ],
)
def test_the_permutation_test_of_few_rows_is_exact(a, b, expected):
    assert paired_permutation_test(a, b) == expected


def test_the_random_permutation_test_agrees_with_the_exact_one():
    rng = random.Random(0)
    a, b = ([rng.gauss(mean, 1) for _ in range(13)] for mean in (0.6, 0.0))
    exact = paired_permutation_test(a, b, num_resamples=2**13)
    drawn = paired_permutation_test(a, b, num_resamples=2**13 - 1)
    assert 0.005 < exact < 0.9
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact / 2**13))


def test_the_permutation_test_of_right_and_wrong_rows_is_mcnemars():
    """With differences of 1 and -1 both count signs: the binomial distribution."""
    a = [1] * 7 + [0] * 2 + [1] * 5
    b = [0] * 7 + [1] * 2 + [1] * 5
    assert paired_permutation_test(a, b) == pytest.approx(mcnemar_exact(a, b))


@pytest.mark.parametrize(
    ("only_a", "only_b", "expected"),
    [(1, 5, 2 * (1 + 6) / 64), (5, 1, 2 * (1 + 6) / 64), (0, 10, 2 / 1024), (3, 3, 1.0), (0, 0, 1.0)],
)
def test_mcnemar_is_the_binomial_tail(only_a, only_b, expected):
    a = [1] * only_a + [0] * only_b + [1, 0]
    b = [0] * only_a + [1] * only_b + [1, 0]
    assert mcnemar_exact(a, b) == pytest.approx(expected)


def test_mcnemar_takes_thousands_of_rows():
    a, b = [1] * 1200 + [0] * 1000, [0] * 1200 + [1] * 1000
    z = 199 / math.sqrt(2200)  # with the correction for continuity
    assert mcnemar_exact(a, b) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)


@pytest.mark.parametrize("test", [paired_bootstrap, paired_permutation_test, mcnemar_exact])
def test_rows_have_to_be_paired(test):
    with pytest.raises(ValueError, match="a has 2 rows and b 1"):
        test([1.0, 0.0], [1.0])


def test_mcnemar_refuses_shares():
    with pytest.raises(ValueError, match=r"b holds 0\.5: must be 0 or 1"):
        mcnemar_exact([1.0], [0.5])

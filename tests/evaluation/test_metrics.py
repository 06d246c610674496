"""Metrics against hand-computed values, a brute-force search and the reference library."""

import itertools
import random

import pytest

from modeling_yan.evaluation import exact_match, masked_words_restored, mean_with_interval, rouge_l

SOURCE = "the <mask> sat on <mask> mat Fill in."
TARGET = "the old cat sat on a mat"
MASKED = ["old cat", "a"]


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("the old cat sat on a mat", 1.0),
        ("the old dog sat on a mat", 2 / 3),
        ("the sat on mat", 0.0),
        ("the very old cat sat on a mat", 1.0),
        ("the cat sat on the mat", 1 / 3),
        ("", 0.0),
    ],
)
def test_restored_words_are_counted_where_they_belong(prediction, expected):
    assert masked_words_restored(prediction, SOURCE, TARGET, MASKED, "<mask>") == pytest.approx(expected)


def test_one_mask_per_token_hides_the_same_words():
    source = "the <mask><mask><mask> sat on <mask> mat Fill in."
    prediction = "the old dog sat on a mat"
    assert masked_words_restored(prediction, source, TARGET, MASKED, "<mask>") == pytest.approx(2 / 3)


def longest_common_subsequence(words, others):
    for length in range(len(words), 0, -1):
        for chosen in itertools.combinations(words, length):
            remaining = iter(others)
            if all(word in remaining for word in chosen):
                return length
    return 0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    rng = random.Random(0)
    for _ in range(30):
        prediction, target = (rng.choices("abcd", k=rng.randint(1, 7)) for _ in range(2))
        common = longest_common_subsequence(prediction, target)
        expected = 2 * common / (len(prediction) + len(target))
        assert rouge_l(" ".join(prediction), " ".join(target)) == pytest.approx(expected)


def test_a_word_counts_as_restored_only_within_a_longest_common_subsequence():
    """With every word masked, the share restored is the longest common subsequence over the target's length."""
    rng = random.Random(1)
    for _ in range(30):
        prediction, target = (" ".join(rng.choices("abcd", k=rng.randint(2, 7))) for _ in range(2))
        common = longest_common_subsequence(target.split(), prediction.split())
        share = masked_words_restored(prediction, "<mask>", target, [target], "<mask>")
        assert share == pytest.approx(common / len(target.split()))


def test_exact_match_ignores_nothing_but_white_space():
    assert exact_match(" The apple. ", "The  apple.") == 1
    assert exact_match("the apple.", "The apple.") == 0


def test_the_interval_covers_the_mean_and_shrinks_with_more_scores():
    rng = random.Random(0)
    few, many = ([float(rng.random() < 0.3) for _ in range(size)] for size in (50, 5000))
    for scores in (few, many):
        mean, low, high = mean_with_interval(scores)
        assert mean == pytest.approx(sum(scores) / len(scores))
        assert low < mean < high
    width = [high - low for _, low, high in map(mean_with_interval, (few, many))]
    # a binomial share has an interval of about 2 * 1.96 * sqrt(p (1 - p) / n)
    assert width[1] == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 5000) ** 0.5, rel=0.15)
    assert width[0] > 5 * width[1]
    assert mean_with_interval([1.0] * 10) == (1.0, 1.0, 1.0)

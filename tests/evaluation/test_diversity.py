"""Diversity against hand-computed values and NLTK's BLEU."""

import math
import random

import pytest

from modeling_yan.evaluation import distinct_n, repetition_rates, self_bleu, unigram_entropies


def test_self_bleu_by_hand():
    """ "a b c d e" in "a b c d f": 4/5, 3/4, 2/3 and 1/2 of the n-grams, no brevity penalty."""
    expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert self_bleu(["a b c d e", "a b c d f"]) == pytest.approx([expected, expected])


def test_self_bleu_smooths_and_penalizes_short_texts_by_hand():
    """ "a b" beside "a b c": precisions 1, 1, then 0.1 for each count of 0 over 1, penalty exp(1 - 3/2)."""
    short, long = self_bleu(["a b", "a b c"])
    assert short == pytest.approx(math.exp(-0.5) * (1 * 1 * 0.1 * 0.1) ** 0.25)
    assert long == pytest.approx((2 / 3 * 1 / 2 * 0.1 * 0.1) ** 0.25)


def test_self_bleu_is_nltks_bleu_against_all_other_texts():
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    smoothing = bleu.SmoothingFunction().method1
    rng = random.Random(0)
    for _ in range(10):
        texts = [rng.choices("abcde", k=rng.randint(1, 12)) for _ in range(8)]
        expected = [
            bleu.sentence_bleu(texts[:i] + texts[i + 1 :], text, smoothing_function=smoothing)
            for i, text in enumerate(texts)
        ]
        assert self_bleu(texts) == pytest.approx(expected)


def test_self_bleu_of_equal_and_of_foreign_texts():
    assert self_bleu(["a b c d e"] * 3) == pytest.approx([1.0] * 3)
    assert self_bleu(["a b", "c d", ""]) == [0.0, 0.0, 0.0]


def test_distinct_counts_ngrams_of_all_texts_together():
    assert distinct_n(["a b a", "a b"], 1) == 2 / 5
    assert distinct_n(["a b a", "a b"], 2) == 2 / 3  # "a b" twice, "b a"
    assert distinct_n(["", "a"], 2) == 0.0


def test_ngrams_do_not_reach_from_one_text_into_the_next():
    assert distinct_n(["a", "b"], 2) == 0.0


def test_repetition_is_the_share_of_ngrams_that_came_before():
    assert repetition_rates(["a a a a", "a b c d", "", "a b a b"], n=1) == [3 / 4, 0.0, 0.0, 1 / 2]
    assert repetition_rates(["a b c d a b c d", "a b c"]) == [1 - 4 / 5, 0.0]


def test_entropy_in_nats():
    expected = [math.log(4), 0.0, 0.0, 0.75 * math.log(4 / 3) + 0.25 * math.log(4)]
    assert unigram_entropies(["a b c d", "a a", "", "a a b a"]) == pytest.approx(expected)


def test_texts_may_be_token_ids_or_any_script():
    assert unigram_entropies([[5, 5, 7, 9]]) == unigram_entropies(["ä ä 犬 ñ"])
    assert distinct_n([[1, 2], [1, 2]], 2) == distinct_n(["да нет", "да нет"], 2) == 1 / 2


@pytest.mark.parametrize(
    "function", [self_bleu, repetition_rates, unigram_entropies, lambda texts: distinct_n(texts, 1)]
)
def test_no_texts_and_one_string_are_refused(function):
    with pytest.raises(ValueError, match="texts: no rows"):
        function([])
    with pytest.raises(ValueError, match="texts is one string"):
        function("a b c")


def test_one_text_has_no_self_bleu_and_orders_begin_at_one():
    with pytest.raises(ValueError, match="must be at least 2"):
        self_bleu(["a b c"])
    with pytest.raises(ValueError, match="n=0"):
        distinct_n(["a"], 0)
    with pytest.raises(ValueError, match="n=0"):
        repetition_rates(["a"], 0)

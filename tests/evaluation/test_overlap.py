"""Scores of predictions against references, one a row: hand-computed values, the reference library, edge cases."""

import pytest
from rouge_score.rouge_scorer import RougeScorer

from modeling_yan.evaluation import (
    accuracy_scores,
    exact_match,
    exact_match_scores,
    normalize_answer,
    rouge_l,
    rouge_scores,
    token_f1_scores,
    unicode_words,
)

PREDICTIONS = ["the cat sat on the mat", "", "a dog", "police killed the gunman"]
REFERENCES = ["the cat was on the mat", "a dog", "", "the gunman police killed"]


def test_rouge_by_hand():
    scores = rouge_scores(PREDICTIONS[:1], REFERENCES[:1])
    assert scores == {
        "rouge1": [pytest.approx(5 / 6)],
        "rouge2": [pytest.approx(3 / 5)],
        "rougeL": [pytest.approx(5 / 6)],
    }


def test_rouge_is_the_reference_librarys_and_0_for_empty_texts():
    scores = rouge_scores(PREDICTIONS, REFERENCES)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for row, (prediction, reference) in enumerate(zip(PREDICTIONS, REFERENCES)):
        expected = scorer.score(reference, prediction)
        assert {name: scores[name][row] for name in scores} == {name: expected[name].fmeasure for name in expected}
    assert scores["rougeL"][1:3] == [0.0, 0.0]
    assert rouge_l(PREDICTIONS[3], REFERENCES[3]) == scores["rougeL"][3] == 0.5
    assert rouge_scores([""], [""])["rouge1"] == [0.0]


def test_rouge_sees_other_scripts_only_with_another_tokenizer():
    texts, wanted = ["Ёлка в лесу"], ["ёлка в поле"]
    assert rouge_scores(texts, wanted)["rouge1"] == [0.0]
    assert rouge_scores(texts, wanted, tokenize=unicode_words)["rouge1"] == [pytest.approx(2 / 3)]


def test_rouge_with_stemmer_and_without():
    assert rouge_scores(["running dogs"], ["run dog"], use_stemmer=True)["rouge1"] == [1.0]
    assert rouge_scores(["running dogs"], ["run dog"])["rouge1"] == [0.0]


def test_squad_normalization():
    assert normalize_answer(" The  Eiffel-Tower, a tower. ") == "eiffeltower tower"
    assert normalize_answer("theatre an") == "theatre"
    assert normalize_answer("Ünïcode «ж»") == "ünïcode «ж»"  # only ASCII punctuation goes


def test_exact_match_with_and_without_normalization():
    predictions, references = ["The apple.", "apple", "", "the"], ["apple", "pear", "", ""]
    assert exact_match_scores(predictions, references) == [0, 0, 1, 0]
    assert exact_match_scores(predictions, references, normalize=True) == [1, 0, 1, 1]
    assert exact_match("The apple!", "an Apple", normalize=True) == 1


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the red apple", "a red big apple", 2 * 2 / (2 + 3)),
        ("red red red", "red", 2 * 1 / (3 + 1)),
        ("", "red", 0.0),
        ("red", "", 0.0),
        ("", "", 1.0),
        ("the", "a", 1.0),  # nothing but articles: both empty after normalization
        ("café Ñandú", "café ñandú", 1.0),
    ],
)
def test_token_f1_by_hand(prediction, reference, expected):
    assert token_f1_scores([prediction], [reference]) == [pytest.approx(expected)]


def test_token_f1_without_normalization():
    assert token_f1_scores(["The apple."], ["the apple"], normalize=False) == [0.0]


def test_accuracy_of_strings_and_numbers():
    assert accuracy_scores([" sport", "sport", "World"], ["sport ", "world", "world"]) == [1, 0, 0]
    assert accuracy_scores([1, 2], [1, 3]) == [1, 0]


@pytest.mark.parametrize("function", [exact_match_scores, accuracy_scores, token_f1_scores, rouge_scores])
def test_lists_of_other_length_are_refused_by_name(function):
    with pytest.raises(ValueError, match="there are 2 predictions and 1 references: must be as many"):
        function(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="predictions and references: no rows"):
        function([], [])
    with pytest.raises(ValueError, match="predictions is one string"):
        function("a", ["a"])

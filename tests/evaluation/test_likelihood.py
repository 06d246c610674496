"""Generative perplexity against the judge's own loss and against a judge whose answer is known."""

import math

import pytest
import torch

from modeling_yan.baselines import make_baseline
from modeling_yan.evaluation import generative_perplexity

TEXTS = ["Mary took the apple.", "The key is in the library of the old house.", "犬 ünïcode"]


def loss_of(judge, ids, first):
    """Sum of the negative log-likelihoods of the tokens from `first` on, by the judge's own loss."""
    labels = torch.tensor([[-100] * first + ids[first:]])
    with torch.no_grad():
        return float(judge(input_ids=torch.tensor([ids]), labels=labels).loss) * (len(ids) - first)


def test_every_token_of_the_texts_counts_once(gpt2, tokenizer):
    result = generative_perplexity(TEXTS, gpt2, tokenizer, batch_size=2)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    losses = [loss_of(gpt2, [tokenizer.bos_token_id, *ids], 1) for ids in rows]
    assert result.num_tokens == [len(ids) for ids in rows]
    assert result.negative_log_likelihoods == pytest.approx(losses, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / sum(map(len, rows))), rel=1e-5)


def test_a_judge_without_opinion_has_the_perplexity_of_its_vocabulary(gpt2, tokenizer):
    gpt2.lm_head.weight.data.zero_()  # tied: the embeddings as well
    result = generative_perplexity(TEXTS, gpt2, tokenizer)
    assert result.perplexity == pytest.approx(gpt2.config.vocab_size)


def test_prompts_are_seen_and_not_counted(gpt2, tokenizer):
    prompts = ["Where is the apple?", "", "Question:"]
    result = generative_perplexity(TEXTS, gpt2, tokenizer, prompts=prompts)
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    for row, (prompt, text) in enumerate(zip(prompts, TEXTS)):
        before, ids = [tokenizer.bos_token_id, *encode(prompt)], encode(f" {text}" if prompt else text)
        assert result.num_tokens[row] == len(ids)
        expected = loss_of(gpt2, before + ids, len(before))
        assert result.negative_log_likelihoods[row] == pytest.approx(expected, rel=1e-5)
    assert result.perplexity != generative_perplexity(TEXTS, gpt2, tokenizer).perplexity


def test_without_bos_the_first_token_is_not_counted(gpt2, tokenizer):
    tokenizer.bos_token = None
    (text,) = TEXTS[:1]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    result = generative_perplexity([text], gpt2, tokenizer)
    assert result.num_tokens == [len(ids) - 1]
    assert result.negative_log_likelihoods == pytest.approx([loss_of(gpt2, ids, 1)], rel=1e-5)


def test_an_empty_text_has_no_tokens(gpt2, tokenizer):
    result = generative_perplexity(["", *TEXTS], gpt2, tokenizer)
    assert (result.num_tokens[0], result.negative_log_likelihoods[0]) == (0, 0.0)
    assert result.perplexity == pytest.approx(generative_perplexity(TEXTS, gpt2, tokenizer).perplexity, rel=1e-6)
    with pytest.raises(ValueError, match="2 texts without a token to count"):
        generative_perplexity(["", ""], gpt2, tokenizer, prompts=["a", ""])


def test_a_long_prompt_loses_its_beginning_and_a_long_text_is_refused(gpt2, tokenizer):
    word = tokenizer(" apple", add_special_tokens=False)["input_ids"]
    prompt = " apple" * (100 // len(word))
    result = generative_perplexity(["a key"], gpt2, tokenizer, prompts=[prompt])
    ids = tokenizer(" a key", add_special_tokens=False)["input_ids"]
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"][-(63 - len(ids)) :]
    expected = loss_of(gpt2, [tokenizer.bos_token_id, *before, *ids], 64 - len(ids))
    assert result.negative_log_likelihoods == pytest.approx([expected], rel=1e-5)
    with pytest.raises(ValueError, match="must be at most 63 for this judge"):
        generative_perplexity([prompt], gpt2, tokenizer)


def test_the_judge_may_be_a_folder(gpt2, tokenizer, gpt2_folder):
    expected = generative_perplexity(TEXTS, gpt2, tokenizer)
    assert generative_perplexity(TEXTS, str(gpt2_folder)).perplexity == pytest.approx(expected.perplexity)


def test_a_judge_that_is_none_and_bad_input_are_refused(gpt2, tokenizer, tiny_model):
    with pytest.raises(ValueError, match="must be autoregressive"):
        generative_perplexity(TEXTS, tiny_model, tokenizer)
    with pytest.raises(ValueError, match="judge of model_type 'yan-masked-diffusion': must be autoregressive"):
        generative_perplexity(TEXTS, make_baseline("masked_diffusion", tiny_model.config), tokenizer)
    with pytest.raises(ValueError, match="tokenizer=None"):
        generative_perplexity(TEXTS, gpt2)
    with pytest.raises(ValueError, match="3 texts and 1 prompts"):
        generative_perplexity(TEXTS, gpt2, tokenizer, prompts=["a"])
    with pytest.raises(ValueError, match="no rows"):
        generative_perplexity([], gpt2, tokenizer)

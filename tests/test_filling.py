"""Gaps of any length are filled, and the text around them stays."""

from types import SimpleNamespace

import pytest
import torch

from modeling_yan import YanForFlowGeneration

TEXT = "(You are <mask> in having <mask>, Sir!) A <mask>"


@pytest.fixture(scope="module")
def tokenizer(bundled_tokenizer):
    return bundled_tokenizer


@pytest.fixture(scope="module")
def model(bundled_model):
    return bundled_model


def test_the_text_around_the_gaps_stays(model, tokenizer):
    filled = model.fill(tokenizer, TEXT)
    assert len(filled.spans) == 3
    assert filled.text == TEXT.replace("<mask>", "{}").format(*filled.spans)
    assert "<" not in filled.text
    assert filled.score <= 0
    assert model.fill(tokenizer, TEXT) == filled


def test_a_wider_choice_is_never_less_probable(model, tokenizer):
    scores = [model.fill(tokenizer, "You are lucky in having <mask> a master.", width).score for width in (1, 2, 4)]
    assert scores == sorted(scores)


@pytest.mark.parametrize("wanted", ["kitchen", "old kitchen", "very old kitchen"])
def test_a_gap_is_as_wide_as_its_text(model, tokenizer, wanted, monkeypatch):
    """A model that knows the text word for word fills each gap with what stands there, whatever its length."""
    target = tokenizer(f"Mary is in the {wanted} now.")["input_ids"]
    canvas = torch.full((model.config.canvas_length,), tokenizer.eos_token_id)
    canvas[: len(target)] = torch.tensor(target)
    logits = torch.zeros(len(canvas), model.config.vocab_size).scatter(1, canvas.unsqueeze(1), 20.0)

    def know(self, ids, *args, **kwargs):
        return SimpleNamespace(logits=logits.expand(len(ids), -1, -1))

    monkeypatch.setattr(YanForFlowGeneration, "__call__", know)
    assert model.fill(tokenizer, "Mary is in the <mask> now.", max_gap_tokens=6).spans == (wanted,)


def test_a_tokenizer_without_a_mask_is_refused(model):
    with pytest.raises(ValueError, match="mask_token=None: must be a token, which stands for a gap"):
        model.fill(SimpleNamespace(mask_token=None), "a <mask>")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("no gap", {}, "must be a string with at least one <mask>"),
        (["<mask>"], {}, "must be a string with at least one <mask>"),
        ("a <mask>", {"max_gap_tokens": 0}, "max_gap_tokens=0: must be an integer of at least 1"),
        ("word " * 60 + "<mask>", {}, "must be at most 40, the canvas's width"),
    ],
)
def test_what_cannot_be_filled_is_refused(model, tokenizer, text, options, message):
    with pytest.raises(ValueError, match=message):
        model.fill(tokenizer, text, **options)

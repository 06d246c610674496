"""Masked diffusion: its objective, its sampler, and that padding and batch mates change nothing."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_yan.baselines import MaskedDiffusion, MaskedDiffusionConfig

MASK, EOS, PAD = 3, 2, 0


@pytest.fixture
def config():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS, "mask_token_id": MASK}
    return MaskedDiffusionConfig(
        vocab_size=40, canvas_length=8, initializer_range=0.2, tie_word_embeddings=True, **sizes, **ids
    )


@pytest.fixture
def model(config):
    return MaskedDiffusion(config).eval()


@pytest.fixture
def prompts():
    return torch.randint(4, 40, (3, 6))


def test_every_place_of_prompt_and_canvas_sees_all_the_others(model, prompts):
    canvas = torch.full((3, 8), MASK)
    before = model.canvas_logits(prompts, torch.ones_like(prompts), canvas)
    changed = canvas.clone()
    changed[:, -1] = 7
    assert not torch.allclose(model.canvas_logits(prompts, torch.ones_like(prompts), changed)[:, 0], before[:, 0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_changes_nothing(config, prompts, side, attention):
    model = MaskedDiffusion._from_config(config, attn_implementation=attention).eval()
    canvas = torch.full((3, 8), MASK)
    padding = torch.full((3, 4), PAD)
    parts = [padding, prompts] if side == "left" else [prompts, padding]
    ids = torch.cat(parts, dim=1)
    expected = model.canvas_logits(prompts, torch.ones_like(prompts), canvas)
    torch.testing.assert_close(model.canvas_logits(ids, (ids != PAD).long(), canvas), expected, atol=1e-5, rtol=1e-4)


def test_the_loss_is_the_weighted_cross_entropy_of_masked_tokens_alone(model, prompts):
    labels = torch.tensor([[5, 6, EOS, -100], [7, EOS, -100, -100], [8, 9, 10, EOS]])
    torch.manual_seed(3)
    loss = model(prompts, labels=labels).loss
    torch.manual_seed(3)
    share, is_masked = torch.rand(3, 1), torch.rand(3, 8)
    is_masked = is_masked < share
    target = torch.full((3, 8), EOS)
    target[:, :4] = torch.where(labels == -100, EOS, labels)
    logits = model.canvas_logits(prompts, torch.ones_like(prompts), target.masked_fill(is_masked, MASK))
    terms = -logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1) / share
    torch.testing.assert_close(loss, (terms * is_masked).sum() / 24)


@torch.no_grad()
def test_the_loss_of_a_uniform_guess_is_log_of_the_vocabulary_on_average(model):
    model.lm_head.weight.zero_()
    loss = model(torch.randint(4, 40, (1000, 2)), labels=torch.randint(4, 40, (1000, 8))).loss
    assert loss.item() == pytest.approx(math.log(40), rel=0.05)


def test_the_logits_of_an_untouched_canvas_have_the_width_asked_for(model, prompts):
    assert model(prompts).logits.shape == (3, 8, 40)
    assert model(prompts, canvas_length=5).logits.shape == (3, 5, 40)
    assert model(prompts, labels=torch.full((3, 2), 5), canvas_length=5).logits.shape == (3, 2, 40)


def test_generation_is_deterministic_and_leaves_no_mask(model, prompts):
    for steps in (1, 3, 8, 50):
        sequences = model.generate(prompts, num_diffusion_steps=steps, max_new_tokens=7)
        assert sequences.shape == (3, 13)
        assert torch.equal(sequences[:, :6], prompts)
        assert not (sequences[:, 6:] == MASK).any()
        assert torch.equal(sequences, model.generate(prompts, num_diffusion_steps=steps, max_new_tokens=7))


def test_a_row_is_written_without_regard_to_its_batch_and_padding(model, prompts):
    ids = torch.cat([torch.full((3, 2), PAD), prompts], dim=1)
    together = model.generate(ids, attention_mask=(ids != PAD).long())[:, -8:]
    for row in range(3):
        assert torch.equal(model.generate(prompts[row : row + 1])[0, -8:], together[row])


def test_one_step_takes_the_most_likely_token_everywhere(model, prompts):
    logits = model(prompts).logits
    logits[..., MASK] = -torch.inf
    tokens = logits.argmax(-1)
    written = model.generate(prompts, num_diffusion_steps=1)[:, 6:]
    is_eos = tokens == EOS
    assert torch.equal(written, tokens.masked_fill(is_eos.cumsum(1) - is_eos.long() > 0, PAD))


def test_the_surest_token_is_kept_first_and_the_rest_is_masked_again(model):
    logits = torch.zeros(1, 4, 40)
    logits[0, torch.arange(4), torch.tensor([5, 6, 7, 8])] = torch.tensor([1.0, 4.0, 2.0, 3.0])
    canvas = model._unmask(torch.full((1, 4), MASK), logits, 2)
    assert canvas.tolist() == [[MASK, 6, MASK, 8]]
    assert model._unmask(canvas, -logits, 3)[0, [1, 3]].tolist() == [6, 8]  # what is known stays


def test_what_follows_the_first_eos_is_padding(model, prompts, monkeypatch):
    logits = torch.zeros(3, 8, 40)
    logits[..., EOS] = 1.0
    monkeypatch.setattr(model, "canvas_logits", lambda *_: logits.clone())
    assert model.generate(prompts)[:, 6:].tolist() == [[EOS, *[PAD] * 7]] * 3
    written = model.generate(prompts, min_new_tokens=2)[:, 6:]
    assert (written[:, :2] != EOS).all()
    assert (written[:, 2] == EOS).all()


def test_the_steps_come_from_the_call_or_the_config(model, prompts, monkeypatch):
    calls = []
    original = model.canvas_logits
    monkeypatch.setattr(model, "canvas_logits", lambda *inputs: calls.append(1) or original(*inputs))

    def count(**options):
        calls.clear()
        model.generate(prompts, **options)
        return len(calls)

    assert count() == 8  # 16 of the config, of which a canvas of 8 tokens can use 8
    model.config.num_diffusion_steps = 4
    assert count() == 4
    assert count(num_diffusion_steps=2) == 2


def test_a_saved_model_is_the_same_model(model, prompts, tmp_path):
    model.config.num_diffusion_steps = 5
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, MaskedDiffusion)
    assert loaded.config.num_diffusion_steps == 5
    assert loaded.generation_config.eos_token_id == EOS
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(loaded(prompts).logits, model(prompts).logits)


def test_it_learns_a_mapping(config):
    config.hidden_size = 32
    model = MaskedDiffusion(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    sources = torch.arange(10, 20).unsqueeze(1).expand(-1, 3)
    labels = torch.stack([sources[:, 0] + 10, sources[:, 0], torch.full((10,), EOS)], dim=1)
    for _ in range(150):
        optimizer.zero_grad()
        model(sources, labels=labels, canvas_length=4).loss.backward()
        optimizer.step()
    written = model.eval().generate(sources, max_new_tokens=4, num_diffusion_steps=4)[:, 3:6]
    assert (written == labels).all(1).float().mean() >= 0.5  # by chance none


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 9}, "a canvas of 9 tokens: must be 1 to canvas_length=8"),
        ({"max_new_tokens": 0}, "a canvas of 0 tokens"),
        ({"num_diffusion_steps": 0}, "num_diffusion_steps=0: must be at least 1"),
        ({"num_diffusion_steps": -2}, "num_diffusion_steps=-2"),
        ({"do_sample": True}, "do_sample=True: must be None or False"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"num_difusion_steps": 4}, "no argument num_difusion_steps"),
    ],
)
def test_bad_options_are_refused(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, **options)


def test_labels_that_do_not_fit_into_the_canvas_are_refused(model, prompts):
    with pytest.raises(ValueError, match="labels of 9 tokens: must be at most the canvas of 8"):
        model(prompts, labels=torch.full((3, 9), 5))

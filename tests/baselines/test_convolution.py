"""Baselines with YAN's short convolution: what a token sees, padding, saved models, and generation without a cache."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from modeling_yan.baselines import CONVOLVED, make_baseline
from modeling_yan.baselines.convolution import CausalShortConvolution
from modeling_yan.layers_yan import YanShortConvolution

PAD, WIDTH = 0, 5
AUTOREGRESSIVE = [kind for kind in CONVOLVED if "decoder" in kind]


@pytest.fixture
def variant():
    """The baselines have no variants: one is enough."""
    return "attention"


@pytest.fixture
def make(make_config):
    """Function from a kind to a small seeded model in evaluation mode."""

    def make_model(kind):
        torch.manual_seed(0)
        return make_baseline(kind, make_config(initializer_range=0.3, attention_conv_kernel=WIDTH)).eval()

    return make_model


@pytest.fixture
def prompts():
    return torch.randint(4, 64, (3, 7))


def logits(model, ids, mask=None, written=None):
    """Of a decoder for ids (B, S), of an encoder-decoder for `written` (B, L), of masked diffusion for its canvas."""
    inputs = {"decoder_input_ids": written} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, attention_mask=mask, **inputs).logits


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, YanShortConvolution)]


def test_a_causal_convolution_is_a_sum_over_the_present_and_earlier_tokens():
    layer, states = CausalShortConvolution(3, WIDTH), torch.randn(2, 8, 3)
    expected = states.clone()
    for place in range(8):
        for distance in range(min(WIDTH, place + 1)):
            expected[:, place] += layer.weight[:, 0, -1 - distance] * states[:, place - distance]
    torch.testing.assert_close(layer(states), expected)


def test_only_where_no_token_may_look_ahead_the_convolution_is_causal(make):
    def causal(module):
        return [isinstance(layer, CausalShortConvolution) for layer in convolutions(module)]

    assert causal(make("decoder_conv")) == [True] * 4
    assert causal(make("masked_diffusion_conv")) == [False] * 4
    model = make("encoder_decoder_conv")
    assert (causal(model.encoder), causal(model.decoder)) == ([False] * 2, [True] * 2)


@pytest.mark.parametrize("kind", CONVOLVED)
def test_without_its_convolutions_it_is_the_plain_baseline(kind, make, make_config, prompts):
    model, plain = make(kind), make(CONVOLVED[kind])
    for layer in convolutions(model):
        torch.nn.init.zeros_(layer.weight)
    width = "d_ff" if plain.config.is_encoder_decoder else "intermediate_size"
    plain = type(plain)(type(plain.config)(**{**plain.config.to_dict(), width: getattr(model.config, width)})).eval()
    weights = model.state_dict()
    named = {
        name.replace("ttention.attention.", "ttention.").replace("attn.attention.", "attn."): name for name in weights
    }
    plain.load_state_dict({name: weights[own] for name, own in named.items() if "convolution" not in name})
    torch.testing.assert_close(logits(model, prompts, written=prompts), logits(plain, prompts, written=prompts))


@pytest.mark.parametrize("kind", AUTOREGRESSIVE)
def test_a_later_token_changes_no_earlier_logits(kind, make, prompts):
    model, changed = make(kind), prompts.clone()
    changed[:, 4] = (changed[:, 4] + 7) % 60 + 4
    source = prompts if model.config.is_encoder_decoder else None
    before, after = (logits(model, ids if source is None else source, written=ids) for ids in (prompts, changed))
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:])


@pytest.mark.parametrize("kind", CONVOLVED)
def test_a_token_reaches_those_on_both_sides_but_in_the_decoder_only_later_ones(kind, make):
    stack = getattr(make(kind), "encoder" if "encoder" in kind else "model")
    convolution = convolutions(stack)[0]
    states = torch.randn(1, 9, 32)
    changed = states.clone()
    changed[:, 4] += 1.0
    reached = (convolution(changed) != convolution(states)).any(-1)[0].nonzero().flatten().tolist()
    assert reached == (list(range(4, 9)) if kind == "decoder_conv" else list(range(2, 7)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CONVOLVED)
def test_padding_changes_nothing(kind, side, attention, make, prompts):
    model = make(kind).double()  # T5's attention is so sharp that it multiplies rounding errors
    model.set_attn_implementation(attention)
    padding = torch.full((3, 4), PAD)
    ids = torch.cat([padding, prompts] if side == "left" else [prompts, padding], dim=1)
    expected = logits(model, prompts, written=prompts)
    padded = logits(model, ids, (ids != PAD).long(), written=prompts)
    if kind == "decoder_conv":
        padded = padded[:, 4:] if side == "left" else padded[:, :7]
    torch.testing.assert_close(padded, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", AUTOREGRESSIVE)
def test_generation_writes_the_likeliest_tokens_of_full_forward_passes(kind, make, prompts):
    model, padded = make(kind), torch.cat([torch.full((3, 3), PAD), prompts], dim=1)
    for parameter in model.parameters():  # or a fresh model would repeat itself
        torch.nn.init.normal_(parameter)
    model.generation_config.eos_token_id = None  # so that all write on
    options = {"max_new_tokens": 12, "do_sample": False}
    start = (
        torch.full((3, 1), model.config.decoder_start_token_id or PAD) if model.config.is_encoder_decoder else prompts
    )
    written = start
    for _ in range(12):
        ids = prompts if model.config.is_encoder_decoder else written
        written = torch.cat([written, logits(model, ids, written=written)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(prompts, attention_mask=torch.ones_like(prompts), **options), written)
    sequences = model.generate(padded, attention_mask=(padded != PAD).long(), **options)
    assert torch.equal(sequences[:, -12:], written[:, -12:])
    assert len(written[:, -12:].unique()) > 3


@pytest.mark.parametrize("kind", AUTOREGRESSIVE)
def test_a_cache_is_refused(kind, make, prompts):
    with pytest.raises(ValueError, match="use_cache=True: must be False for a model with short convolutions"):
        make(kind).generate(prompts, attention_mask=torch.ones_like(prompts), use_cache=True, max_new_tokens=2)


@pytest.mark.parametrize("kind", CONVOLVED)
def test_a_saved_model_is_the_same_model(kind, make, prompts, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path)
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.attention_conv_kernel == WIDTH
    assert len(convolutions(loaded)) == 4
    assert loaded.get_input_embeddings().weight is loaded.lm_head.weight
    assert torch.equal(logits(loaded.eval(), prompts, written=prompts), logits(model, prompts, written=prompts))


@pytest.mark.parametrize("kind", CONVOLVED)
def test_convolutions_start_as_yans_do(kind, make, make_model):
    (yan, *_) = convolutions(make_model(attention_conv_kernel=WIDTH))
    for layer in convolutions(make(kind)):
        assert layer.weight.shape == yan.weight.shape
        assert layer.weight.std().item() == pytest.approx(yan.weight.std().item(), rel=0.2)


@pytest.mark.parametrize("kind", CONVOLVED)
def test_all_else_starts_as_the_plain_baseline_does(kind, make):
    plain = dict(make(CONVOLVED[kind]).named_parameters())
    for name, weight in make(kind).named_parameters():
        if "convolution" not in name and weight.numel() > 500:
            own = plain[name.replace(".attention.", ".")]
            assert weight.std().item() == pytest.approx(own.std().item(), rel=0.25), name


@pytest.mark.parametrize("kind", CONVOLVED)
def test_gradient_checkpointing_changes_no_gradients(kind, make, prompts):
    def gradients(checkpointing):
        model = make(kind).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        mask = torch.ones_like(prompts)
        mask[0, :2] = 0
        model(input_ids=prompts, attention_mask=mask, labels=prompts).loss.backward()
        return [layer.weight.grad for layer in convolutions(model)]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(checkpointed, plain)

"""What the models' outputs depend on: padding, batch mates, precision; and which input is refused."""

import logging

import pytest
import torch
from generating import pad, random_ids
from transformers.utils import logging as transformers_logging

from modeling_yan import YanForAutoencoding, YanForFlowGeneration, YanModel

# --- invariances


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_latents_nor_logits(lively_model, side):
    model, ids = lively_model(), random_ids()
    padded, mask = pad(ids, side)
    latents = model.model(padded, mask).last_hidden_state[mask.bool()].view(3, 6, 32)
    torch.testing.assert_close(latents, model.model(ids).last_hidden_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(padded, mask).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        model(padded, mask, labels=ids.flip(1)).loss, model(ids, labels=ids.flip(1)).loss, rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(model(padded).logits, model(ids).logits, atol=0.1)  # the mask is what does it


def test_what_stands_under_the_padding_does_not_matter(lively_model):
    model, (ids, mask) = lively_model(), pad(random_ids(), "left")
    other = torch.where(mask.bool(), ids, random_ids(3, 10))
    torch.testing.assert_close(model(other, mask).logits, model(ids, mask).logits)


def test_batch_mates_change_nothing(lively_model):
    model, ids = lively_model(), random_ids(4)
    together = model(ids).logits
    for row in range(4):
        torch.testing.assert_close(model(ids[row : row + 1]).logits[0], together[row], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_embeddings_may_be_given_instead_of_ids(lively_model, monkeypatch):
    model, ids = lively_model(), random_ids()
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    monkeypatch.setattr(model, "_number_rows", lambda *args: torch.arange(3))  # embeddings are no text to draw by
    losses = [model(**given, labels=ids.flip(1)).loss for given in ({"input_ids": ids}, {"inputs_embeds": embeds})]
    torch.testing.assert_close(*losses)
    positions = torch.arange(6).expand(3, -1)
    torch.testing.assert_close(model(ids, position_ids=positions).logits, model(ids).logits)
    assert not torch.allclose(model(ids, position_ids=positions + 3).logits, model(ids).logits)


def test_the_words_order_matters(lively_model):
    model, ids = lively_model(), random_ids(1)
    assert not torch.allclose(model(ids.flip(1)).logits, model(ids).logits, atol=0.1)


def test_hidden_states_and_attentions_are_of_the_prompts_encoder(lively_model, variant):
    model, ids = lively_model(), random_ids()
    model.set_attn_implementation("eager")
    output = model(ids, labels=random_ids(3, 5), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert all(states.shape == (3, 6, 32) for states in output.hidden_states)
    assert [weights.shape for weights in output.attentions] == [(3, 4, 6, 6)] * (2 if variant == "attention" else 0)
    assert torch.equal(output.hidden_states[-1], model.model(ids).last_hidden_state)


# --- precision and compilation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same(make_model, dtype):
    model, (ids, mask), labels = make_model(), pad(random_ids(), "left"), random_ids()
    exact = model(ids, mask, labels=labels)
    model.to(dtype)
    output = model(ids, mask, labels=labels)
    assert output.logits.dtype == dtype
    torch.testing.assert_close(output.logits.float(), exact.logits, atol=0.05, rtol=0)
    for name in ("loss", "nll_loss", "ce_loss", "mse_loss"):
        assert output[name].dtype == torch.float32
        assert output[name].item() == pytest.approx(exact[name].item(), rel=0.02), name
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_autocast_trains(make_model):
    model, ids = make_model().train(), random_ids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids.flip(1)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# --- extremes and bad input


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("training", [False, True])
def test_a_row_without_any_valid_token_gives_no_nan(lively_model, implementation, training):
    model, ids = lively_model().train(training), random_ids()
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[1] = 0
    assert model.model(ids, mask).last_hidden_state.isfinite().all()
    output = model(ids, mask, labels=random_ids())
    assert output.logits.isfinite().all()
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if not training:  # and the other rows never notice
        alone = model(ids[:1], mask[:1]).logits
        torch.testing.assert_close(model(ids, mask).logits[:1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_class", [YanForAutoencoding, YanForFlowGeneration])
@pytest.mark.parametrize("nothing", ["mask", "labels", "both"])
def test_a_batch_with_nothing_in_it_gives_no_nan(make_model, model_class, nothing):
    model, ids = make_model(model_class, mmd_weight=0.1), random_ids()
    mask = torch.zeros_like(ids) if nothing in ("mask", "both") else torch.ones_like(ids)
    labels = torch.full_like(ids, -100) if nothing in ("labels", "both") else ids.flip(1)
    loss = model(ids, mask, labels=labels).loss
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("model_class", [YanModel, YanForAutoencoding, YanForFlowGeneration])
def test_input_that_is_too_long_missing_or_given_twice_is_refused(make_model, model_class):
    model, ids = make_model(model_class), random_ids()
    model(random_ids(1, 48))
    with pytest.raises(ValueError, match=r"49 tokens.*max_position_embeddings=48"):
        model(random_ids(1, 49))
    with pytest.raises(ValueError, match="0 tokens"):
        model(random_ids(1, 0))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


@pytest.mark.parametrize(("argument", "value"), [("canvas_length", 49), ("canvas_length", 0), ("num_flow_steps", 0)])
def test_an_impossible_canvas_or_number_of_steps_is_refused(make_model, argument, value):
    with pytest.raises(ValueError, match=str(value)):
        make_model()(random_ids(), **{argument: value})


def test_padding_without_a_mask_is_warned_about(make_model, caplog, monkeypatch):
    model, (padded, mask) = make_model(YanModel), pad(random_ids(), "right")
    library = transformers_logging.get_logger("transformers")
    monkeypatch.setattr(library, "propagate", True)
    type(library).warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        model(padded, mask)
        model(random_ids())
        assert "attention_mask" not in caplog.text
        model(padded)
    assert "attention_mask" in caplog.text

"""The three model classes: stages, objective, labels, switches, and what they learn."""

import pytest
import torch
from generating import random_ids
from torch import nn

from modeling_yan import YanForAutoencoding, YanForFlowGeneration, YanModel
from modeling_yan.flow_matching_yan import hashed_normal, hashed_uniform

TERMS = ("nll", "mse", "ce", "gate_entropy", "load_balance")
SWITCHES = ("encoder", "decoder", "embeddings", "flow")
PARTS = {
    "encoder": ("model.layers.", "model.norm."),
    "embeddings": ("model.embeddings.",),
    "decoder": ("decoder.", "lm_head."),
    "flow": ("flow.",),
}


def gradients(model, **inputs):
    """Gradients of the loss by parameter name; the same random numbers in every call."""
    torch.manual_seed(1)
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train(model, num_updates, lr=3e-3, **inputs):
    """The loss in training mode before each update."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    losses = []
    for _ in range(num_updates):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def gaussian_mixture_nll(target, velocities, gate, sigma):
    """Mean negative log-likelihood by torch.distributions."""
    components = torch.distributions.Independent(torch.distributions.Normal(velocities, sigma), 1)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=gate.log()), components)
    return -mixture.log_prob(target).mean()


# --- from stage one to stage two


@pytest.mark.parametrize("tied", [False, True])
def test_stage_two_takes_all_but_the_flow_from_stage_one(make_model, tmp_path, tied):
    stage_one = make_model(YanForAutoencoding, tie_word_embeddings=tied)
    stage_one.save_pretrained(tmp_path)
    stage_two, info = YanForFlowGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {name for name in stage_two.state_dict() if name.startswith("flow.")}
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    loaded = stage_two.state_dict()
    for name, tensor in stage_one.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    assert (stage_two.lm_head.weight is stage_two.model.embeddings.word_embeddings.weight) == tied


def test_the_new_flow_is_initialised_as_in_a_fresh_model(make_model, tmp_path):
    make_model(YanForAutoencoding).save_pretrained(tmp_path)
    loaded = dict(YanForFlowGeneration.from_pretrained(tmp_path).flow.named_parameters())
    for name, parameter in make_model().flow.named_parameters():
        assert loaded[name].isfinite().all(), name
        spread = parameter.std(correction=0).item()
        assert loaded[name].std(correction=0).item() == pytest.approx(spread, rel=0.3, abs=1e-6), name
        assert loaded[name].mean().item() == pytest.approx(parameter.mean().item(), abs=0.5 * spread + 1e-6), name


def test_a_whole_model_survives_saving_and_loading(lively_model, tmp_path):
    model, ids = lively_model(), random_ids()
    model.save_pretrained(tmp_path)
    loaded = YanForFlowGeneration.from_pretrained(tmp_path)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in loaded.state_dict().items())
    # Weights of a file lie elsewhere between the borders of cache lines, and products then add in another order.
    torch.testing.assert_close(
        loaded(ids, labels=ids.flip(1)).loss, model(ids, labels=ids.flip(1)).loss, rtol=1e-5, atol=1e-5
    )
    encoder = YanModel.from_pretrained(tmp_path)
    assert torch.equal(encoder(ids).last_hidden_state, model.model(ids).last_hidden_state)


# --- the objective of the flow stage


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_is_the_weighted_sum_of_its_terms(lively_model, training):
    weights = {"nll": 0.7, "mse": 0.3, "ce": 1.1, "gate_entropy": 0.2, "load_balance": 0.9}
    model = lively_model(**{f"{name}_weight": weight for name, weight in weights.items()}).train(training)
    output = model(random_ids(), labels=random_ids(3, 5))
    terms = {
        "nll": output.nll_loss_per_dim,
        "mse": output.mse_loss,
        "ce": output.ce_loss,
        "gate_entropy": -output.gate_entropy,
        "load_balance": output.load_balance_loss,
    }
    assert all(term.dim() == 0 and term.isfinite() for term in terms.values())
    expected = sum(weights[name] * term.item() for name, term in terms.items())
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.nll_loss.item() == pytest.approx(32 * output.nll_loss_per_dim.item(), rel=1e-6)
    assert output.mmd_loss is None
    assert output.latent_norm_loss is None
    assert output.logits.shape == (3, 5, 64)


@pytest.mark.parametrize("term", TERMS)
def test_a_weight_of_zero_switches_a_term_off(lively_model, term):
    weights = {f"{name}_weight": 1.0 if name == term else 0.0 for name in TERMS}
    output = lively_model(**weights)(random_ids(), labels=random_ids())
    name = {"nll": "nll_loss_per_dim", "gate_entropy": "gate_entropy"}.get(term, f"{term}_loss")
    sign = -1 if term == "gate_entropy" else 1  # entropy is rewarded
    assert output.loss.item() == pytest.approx(sign * output[name].item(), rel=1e-6)


def test_the_terms_equal_their_definitions(lively_model):
    model, ids, labels = lively_model(flow_sigma=2.0), random_ids(), random_ids(3, 8)
    output = model(ids, labels=labels)
    x_1, prompt = model.model(labels).last_hidden_state, model.model(ids).last_hidden_state
    rows = model._number_rows(labels, ids, None)
    x_0, time = hashed_normal(0, (3, 8, 32), rows=rows), hashed_uniform(1, (3,), rows=rows)
    x_t = torch.stack([(1 - t) * a + t * b for t, a, b in zip(time, x_0, x_1)])
    condition, modulation = model.condition(prompt, canvas_length=8), model.flow.modulation(time)
    states = model.flow.trunk(x_t, model.model.embeddings.position_embeddings.weight[:8], modulation, condition)
    gate = model.flow.gate_log_probs(states, modulation, condition).exp()
    usage = gate.mean(1)
    expected = {
        "nll_loss": gaussian_mixture_nll(x_1 - x_0, model.flow.experts(states) - x_t.unsqueeze(2), gate, sigma=2.0),
        "gate_entropy": torch.distributions.Categorical(gate).entropy().mean(),
        "load_balance_loss": (usage * (4 * usage).log()).sum(-1).mean(),
        "ce_loss": nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten()),
    }
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_logits_are_those_of_euler_steps_along_each_tokens_first_expert(lively_model):
    model, ids = lively_model(num_flow_steps=3), random_ids(2)
    model.flow.gate.hidden_proj.weight.data[:, 32:] = 0  # a gate that sees the tokens alone tells them apart
    flow, condition = model.flow, model.condition(model.model(ids).last_hidden_state, canvas_length=8)
    positions = model.model.embeddings.position_embeddings.weight[:8]
    x = model.start_noise((1, 8), condition.mean).expand(2, -1, -1)
    for step in range(3):
        modulation = flow.modulation(torch.tensor([step / 3]))
        states = flow.trunk(x, positions, modulation, condition)
        if step == 0:
            chosen = flow.gate_log_probs(states, modulation, condition).argmax(-1)
        head = flow.experts(states).gather(2, chosen[..., None, None].expand(-1, -1, 1, 32)).squeeze(2)
        x = x + (head - x) / 3
    torch.testing.assert_close(model(ids).logits, model.decode(x), rtol=1e-4, atol=1e-4)
    assert len(chosen.unique()) > 1


def test_training_solves_with_every_allowed_number_of_steps_and_evaluation_with_the_default(make_model):
    model = make_model(num_flow_layers=1, min_train_flow_steps=2, max_train_flow_steps=4, num_flow_steps=6)
    passes = []
    model.flow.layers[0].register_forward_hook(lambda *_: passes.append(1))

    def steps_of_one_pass(**inputs):
        passes.clear()
        model(random_ids(1), labels=random_ids(1, 3), **inputs)
        return len(passes) - 1  # one pass is the likelihood's

    assert steps_of_one_pass() == 6
    assert steps_of_one_pass(num_flow_steps=2) == 2
    model.train()
    with torch.no_grad():
        assert {steps_of_one_pass() for _ in range(15)} == {2, 3, 4}


@pytest.mark.parametrize("is_constant", [True, False])
def test_target_latents_are_regularised_only_where_the_encoder_learns_through_them(lively_model, is_constant):
    model = lively_model(detach_target_latents=is_constant, mmd_weight=0.5, latent_norm_weight=0.25)
    only_regularisers = {f"{name}_weight": 0.0 for name in TERMS}
    for name, value in only_regularisers.items():
        setattr(model.config, name, value)
    output = model(random_ids(), labels=random_ids())
    if is_constant:
        assert output.mmd_loss is None
        assert output.loss == 0
    else:
        expected = 0.5 * output.mmd_loss + 0.25 * output.latent_norm_loss
        torch.testing.assert_close(output.loss, expected)
        output.loss.backward()
        assert model.model.layers[0].feed_forward.up_proj.weight.grad.abs().sum() > 0


# --- labels


def padded_labels(targets, layout, width=7):
    """`targets` (lists of ids) as rows of -100 with the ids where `layout` says."""
    labels = torch.full((len(targets), width), -100)
    for row, ids in enumerate(targets):
        places = {"right": range(len(ids)), "left": range(width - len(ids), width), "holes": range(0, 2 * len(ids), 2)}
        labels[row, list(places[layout])] = torch.tensor(ids, dtype=torch.long)
    return labels


@pytest.mark.parametrize("layout", ["left", "holes"])
def test_where_labels_are_padded_makes_no_difference(lively_model, layout):
    model, ids, targets = lively_model(), random_ids(2), [[5, 6, 7, 8], [9, 10]]
    right, other = (model(ids, labels=padded_labels(targets, name)) for name in ("right", layout))
    assert torch.equal(other.loss, right.loss)
    for row, (found, expected) in enumerate(zip(other.logits, right.logits)):
        where = padded_labels(targets, layout)[row] != -100  # a label's logits stand where it stands
        assert torch.equal(found[where], expected[: len(targets[row])])
        assert torch.equal(found[~where], expected[len(targets[row]) :])
    different = model(ids, labels=padded_labels([[5, 6, 7, 8], [9, 11]], layout))
    assert not torch.equal(different.loss, right.loss)


def test_a_target_is_followed_by_eos_to_the_end_of_the_canvas(lively_model):
    model, ids = lively_model(), random_ids(1)
    eos = model.config.eos_token_id
    short = model(ids, labels=torch.tensor([[5, 6, 7]]))
    filled = model(ids, labels=torch.tensor([[5, 6, 7, eos, eos, eos, eos, eos]]))
    assert torch.equal(short.loss, filled.loss)
    assert torch.equal(short.logits, filled.logits[:, :3])
    canvas = model.labels_to_canvas(padded_labels([[5, 6], []], "left", width=3), 4)
    assert canvas.tolist() == [[5, 6, eos, eos], [eos] * 4]


def test_the_canvas_can_be_chosen_and_must_hold_the_labels(make_model):
    model, ids = make_model(), random_ids()
    assert model(ids).logits.shape == (3, 8, 64)
    assert model(ids, canvas_length=12).logits.shape == (3, 12, 64)
    assert model(ids, labels=random_ids(3, 8)).loss.isfinite()
    with pytest.raises(ValueError, match=r"labels are 9 tokens wide.*canvas_length=8"):
        model(ids, labels=random_ids(3, 9))
    assert model(ids, labels=random_ids(3, 9), canvas_length=9).loss.isfinite()


# --- evaluation and training mode


@pytest.mark.parametrize("inputs", [{}, {"labels": random_ids(3, 5)}], ids=["without labels", "with labels"])
def test_evaluation_draws_nothing_at_random(lively_model, inputs):
    model, ids = lively_model(latent_noise=0.5, detach_target_latents=False, mmd_weight=1.0), random_ids()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = model(ids, **inputs)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = model(ids, **inputs)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_training_draws_fresh_noise_and_times(lively_model):
    model = lively_model(decoder_dropout=0.0).train()
    ids = random_ids()
    first, second = (model(ids, labels=ids.flip(1), num_flow_steps=2) for _ in range(2))
    assert first.nll_loss != second.nll_loss
    assert not torch.equal(first.logits, second.logits)


# --- freeze switches


def trained_parts(model):
    """Which parts have only trained parameters, only frozen ones (absent), or both (an error)."""
    found = {part: set() for part in PARTS}
    for name, parameter in model.named_parameters():
        part = next(part for part, prefixes in PARTS.items() if name.startswith(prefixes))
        found[part].add(parameter.requires_grad)
    assert all(len(values) == 1 for values in found.values()), found
    return {part for part, values in found.items() if values == {True}}


@pytest.mark.parametrize(
    "frozen",
    [(), ("encoder",), ("decoder",), ("embeddings",), ("flow",), ("encoder", "decoder", "embeddings")],
)
def test_the_freeze_switches_freeze_exactly_their_part(make_model, tmp_path, frozen):
    switches = {f"freeze_{part}": part in frozen for part in SWITCHES}
    expected = set(PARTS) - set(frozen)
    model = make_model(**switches)
    assert trained_parts(model) == expected
    model.save_pretrained(tmp_path)
    assert trained_parts(YanForFlowGeneration.from_pretrained(tmp_path)) == expected
    thawed = YanForFlowGeneration.from_pretrained(tmp_path, **dict.fromkeys(switches, False))
    assert trained_parts(thawed) == set(PARTS)


@pytest.mark.parametrize("freeze_embeddings", [True, False])
def test_a_tied_head_is_frozen_with_the_embeddings(make_model, tmp_path, freeze_embeddings):
    switches = {"freeze_embeddings": freeze_embeddings, "freeze_decoder": not freeze_embeddings}
    model = make_model(tie_word_embeddings=True, **switches)
    model.save_pretrained(tmp_path)
    for candidate in (model, YanForFlowGeneration.from_pretrained(tmp_path)):
        assert candidate.lm_head.weight.requires_grad is not freeze_embeddings
        assert candidate.decoder.layers[0].feed_forward.up_proj.weight.requires_grad is freeze_embeddings


def test_switches_can_be_changed_later(make_model):
    model = make_model(freeze_encoder=True)
    model.config.freeze_encoder, model.config.freeze_decoder = False, True
    model.apply_freeze_switches()
    assert trained_parts(model) == {"encoder", "embeddings", "flow"}


def test_every_trained_parameter_learns_and_no_frozen_one(lively_model):
    model = lively_model(freeze_encoder=True, freeze_embeddings=True).train()
    found = gradients(model, input_ids=random_ids(), labels=random_ids())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(found) == trained
    assert all(gradient.isfinite().all() for gradient in found.values())
    # a key's bias adds the same to all of a query's scores
    assert {name for name in trained if found[name].abs().max() < 1e-9} <= {n for n in trained if "k_proj.bias" in n}


# --- learning


@pytest.mark.slow
def test_both_stages_learn_a_few_pairs_by_heart(make_model):
    sizes = {"num_encoder_layers": 1, "num_flow_layers": 1, "num_experts": 2, "canvas_length": 4, "decoder_dropout": 0}
    frozen = {f"freeze_{part}": True for part in SWITCHES if part != "flow"}
    ids, labels = random_ids(8, 4), random_ids(8, 4)
    texts = torch.cat([ids, labels])
    stage_one = make_model(YanForAutoencoding, **sizes, latent_noise=0.1)
    before = stage_one(texts, labels=texts).ce_loss
    train(stage_one, 40, lr=5e-3, input_ids=texts, labels=texts)
    restored = stage_one(texts, labels=texts)
    assert restored.ce_loss < 0.2 * before
    assert (restored.logits.argmax(-1) == texts).float().mean() > 0.9

    stage_two = make_model(**sizes, **frozen, max_train_flow_steps=2)
    stage_two.load_state_dict(stage_one.state_dict(), strict=False)
    before = stage_two(ids, labels=labels).ce_loss
    train(stage_two, 60, lr=1e-2, input_ids=ids, labels=labels)
    after = stage_two(ids, labels=labels)
    assert after.ce_loss < 0.3 * before
    assert (after.logits.argmax(-1) == labels).float().mean() > 0.5  # by chance: one in 60


def test_a_single_expert_trains_as_plain_flow_matching(make_model):
    model, ids = make_model(num_experts=1, num_flow_layers=1, decoder_dropout=0.0), random_ids(8, 5)
    losses = train(model, 10, input_ids=ids, labels=ids.flip(1))
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    output = model(ids, labels=ids.flip(1))
    assert output.gate_entropy == 0
    assert output.load_balance_loss == 0


@pytest.mark.parametrize("choice", ["argmax", "sample", "posterior"])
def test_every_way_to_choose_experts_trains(make_model, choice):
    model = make_model(train_expert_choice=choice).train()
    found = gradients(model, input_ids=random_ids(), labels=random_ids())
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["flow.experts.heads.up_proj"].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # its new name is not in every version
def test_gradient_checkpointing_gives_the_same_gradients(make_model):
    model, ids = make_model(hidden_dropout=0.1).train(), random_ids()
    passes = []
    model.model.layers[0].feed_forward.register_forward_hook(lambda *_: passes.append(1))
    plain, num_plain = gradients(model, input_ids=ids, labels=ids.flip(1), num_flow_steps=2), len(passes)
    model.gradient_checkpointing_enable()
    checkpointed, num_checkpointed = (
        gradients(model, input_ids=ids, labels=ids.flip(1), num_flow_steps=2),
        len(passes) - num_plain,
    )
    assert num_checkpointed > num_plain  # something was indeed computed twice
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


# --- the autoencoder's own


def test_the_autoencoders_loss_is_the_weighted_sum_of_its_terms(lively_model):
    model, ids = lively_model(YanForAutoencoding, mmd_weight=0.5, latent_norm_weight=0.25), random_ids()
    labels = ids.masked_fill(ids % 3 == 0, -100)
    output = model(ids, labels=labels)
    assert output.ce_loss.item() == pytest.approx(
        nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten()).item(), rel=1e-5
    )
    expected = output.ce_loss + 0.5 * output.mmd_loss + 0.25 * output.latent_norm_loss
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.latent_norm_loss, output.last_hidden_state.square().mean())
    assert model(ids).loss is None


def test_the_autoencoder_refuses_labels_of_another_shape(make_model):
    with pytest.raises(ValueError, match=r"labels of shape \(3, 5\)"):
        make_model(YanForAutoencoding)(random_ids(3, 6), labels=random_ids(3, 5))


def test_latent_noise_is_for_the_decoder_in_training_alone(lively_model):
    model, ids = lively_model(YanForAutoencoding, latent_noise=0.5, decoder_dropout=0.0), random_ids()
    quiet = model(ids)
    model.train()
    noisy = model(ids)
    assert torch.equal(noisy.last_hidden_state, quiet.last_hidden_state)
    assert not torch.allclose(noisy.logits, quiet.logits)
    model.config.latent_noise = 0.0
    torch.testing.assert_close(model(ids).logits, quiet.logits)

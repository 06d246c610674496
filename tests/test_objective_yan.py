"""The likelihood of texts as an objective: what it is worth, what the gate learns from it, and what is drawn then."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_yan import YanConfig, YanForAutoencoding, YanForFlowGeneration
from modeling_yan.canvas_yan import CanvasNoise, CanvasPlan
from modeling_yan.chains_yan import path_score
from modeling_yan.experts_yan import YanExpertPrior

SCOPES = ("token", "sequence")
POSTERIOR = {"train_expert_choice": "posterior", "max_train_flow_steps": 1}
SLOTS = {"num_answer_slots": 8, "init_noise": 0.3}
REFINING = {"num_answer_slots": 8, "refine_draft": True, "train_expert_choice": "posterior"}
ANSWERS = torch.tensor([[10, 11, 12], [10, 13, 14], [15, 16, 17]])
SHARES = torch.tensor([0.3, 0.3, 0.4])


@pytest.fixture
def make_lively_model(make_model):
    """Function from overrides to a model without parts that start at zero."""

    def make(**overrides):
        model = make_model(**{**POSTERIOR, "initializer_range": 0.3, "num_experts": 3, **overrides})
        for parameter in model.flow.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.3)
        return model

    return make


def first_step(model, ids, noise):
    """Where every expert leads from the noise (B or 1, L, D), and the prior."""
    prompt = model.with_answer_slots(ids)
    length = noise.shape[1]
    condition = model.condition(model.model(**prompt).last_hidden_state, canvas_length=length)
    x_0 = noise.expand(len(ids), -1, -1)
    modulation = model.flow.modulation(torch.zeros(1))
    states = model.flow.trunk(x_0, model._positions(length), modulation, condition)
    ends = x_0.unsqueeze(2) + model.flow.velocities(states, x_0)
    return ends, model.flow.prior(states, modulation, condition)


@pytest.mark.parametrize("fields", [{}, SLOTS], ids=["plain", "slots"])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_texts_likelihood_sums_over_all_experts(make_lively_model, scope, fields):
    model = make_lively_model(expert_scope=scope, **fields)
    ids, labels = torch.randint(4, 64, (2, 5)), torch.randint(4, 64, (2, 4))
    with torch.no_grad():
        found = model(ids, labels=labels, canvas_length=4, num_flow_steps=1)
        rows = model._number_rows(labels, model.with_answer_slots(ids)["input_ids"], None)
        ends, prior = first_step(model, ids, model._draw_path(torch.empty(2, 4, 32), rows)[0])
        log_likelihood = model.decode(ends).log_softmax(-1).gather(-1, labels[..., None, None].expand(-1, -1, 3, 1))
    total = 0
    for row in range(2):
        evidence = 0
        paths = product(range(3), repeat=4) if scope != "sequence" else [(expert,) * 4 for expert in range(3)]
        for path in paths:
            joint = sum(log_likelihood[row, token, expert, 0] for token, expert in enumerate(path))
            joint = joint + prior.gate_log_probs[row, 0, path[0]]
            if scope == "token":
                joint = joint + sum(prior.gate_log_probs[row, token, path[token]] for token in range(1, 4))
            evidence = evidence + joint.exp()
        total = total - evidence.log() / 8
    torch.testing.assert_close(found.text_loss, total, rtol=1e-4, atol=1e-5)
    terms = found.text_loss + found.ce_loss + found.mse_loss
    if fields:
        terms = terms + model.config.draft_weight * found.draft_loss
    torch.testing.assert_close(found.loss, terms)
    torch.testing.assert_close(found.expert_usage.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("scope", SCOPES)
def test_the_first_term_trains_the_gate_and_the_second_the_chosen_experts(make_lively_model, scope):
    model = make_lively_model(expert_scope=scope, mse_weight=0.0).train()
    ids, labels = torch.randint(4, 64, (8, 5)), torch.randint(4, 64, (8, 8))
    output = model(ids, labels=labels, num_flow_steps=1)
    output.text_loss.backward(retain_graph=True)
    assert model.flow.gate.expert_proj.weight.grad.abs().sum() > 0
    assert model.lm_head.weight.grad is None  # the likelihoods are constants
    output.ce_loss.backward()
    assert model.flow.experts.heads.down_proj.grad.abs().sum() > 0


def train(make_model, scope, num_updates=500, **fields):
    sizes = {"num_encoder_layers": 1, "canvas_length": 4, "initializer_range": 0.08, "num_experts": 8}
    model = make_model(**{**POSTERIOR, **sizes, "expert_scope": scope, "mse_weight": 0.0, **fields}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_updates)
    for _ in range(num_updates):
        labels = ANSWERS[torch.multinomial(SHARES, 32, replacement=True)]
        model(torch.full((32, 1), 5), labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.slow
def test_drawn_texts_are_the_answers_as_often_as_they_are_right(make_model):
    model = train(make_model, "sequence")
    options = {"max_new_tokens": 4, "return_prompt": False, "do_sample": True, "num_return_sequences": 2000}
    for num_flow_steps in (1, 3):
        texts = model.generate(torch.tensor([[5]]), seed=0, num_flow_steps=num_flow_steps, **options)[:, :3]
        is_answer = (texts.unsqueeze(1) == ANSWERS).all(-1)
        assert is_answer.any(-1).float().mean() > 0.95
        assert (is_answer.float().mean(0) - SHARES).abs().max() < 0.08


class TestAnswerSlots:
    def test_they_are_mask_tokens_before_the_prompt(self, make_lively_model):
        own, typed = make_lively_model(num_answer_slots=8), make_lively_model()
        typed.load_state_dict(own.state_dict())
        ids = torch.randint(4, 64, (3, 6))
        slots = torch.full((3, 8), own.config.mask_token_id)
        options = {"return_prompt": False, "num_flow_steps": 2}
        assert torch.equal(own.generate(ids, **options), typed.generate(torch.cat([slots, ids], 1), **options))

    @pytest.mark.parametrize("num_tokens", [5, 8, 11])
    def test_they_are_copies_of_the_prompts_first_tokens(self, make_lively_model, num_tokens):
        own, typed = make_lively_model(num_answer_slots=8, copy_prompt_to_slots=True), make_lively_model()
        typed.load_state_dict(own.state_dict())
        ids = torch.randint(4, 64, (3, num_tokens))
        slots = nn.functional.pad(ids[:, :8], (0, max(0, 8 - num_tokens)), value=own.config.mask_token_id)
        options = {"return_prompt": False, "num_flow_steps": 2}
        assert torch.equal(own.generate(ids, **options), typed.generate(torch.cat([slots, ids], 1), **options))

    @pytest.mark.parametrize("copies", [True, False])
    @pytest.mark.parametrize("left", [True, False])
    def test_padding_changes_nothing(self, make_lively_model, left, copies):
        model = make_lively_model(**SLOTS, expert_scope="sequence", copy_prompt_to_slots=copies)
        ids = torch.randint(4, 64, (1, 6))
        padded, mask = nn.functional.pad(ids, (3, 0) if left else (0, 3)), torch.ones(1, 9, dtype=torch.long)
        mask[:, slice(0, 3) if left else slice(6, 9)] = 0
        options = {"return_prompt": False}
        assert torch.equal(model.generate(ids, **options), model.generate(padded, attention_mask=mask, **options))

    @pytest.mark.parametrize("copies", [True, False])
    def test_embeddings_and_ids_give_the_same(self, make_lively_model, copies):
        model, ids = make_lively_model(**SLOTS, copy_prompt_to_slots=copies), torch.randint(4, 64, (2, 6))
        positions, mask = torch.arange(6).expand(2, -1), torch.ones(2, 6)
        mask[0, 4:] = 0
        given = {"position_ids": positions, "attention_mask": mask}
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), **given).logits
        torch.testing.assert_close(model(ids, **given).logits, embedded)

    def test_no_step_reads_off_the_encoders_draft(self, make_lively_model):
        model, ids = make_lively_model(num_answer_slots=8), torch.randint(4, 64, (2, 6))
        states = model.model(**model.with_answer_slots(ids)).last_hidden_state
        torch.testing.assert_close(model(ids, num_flow_steps=0).logits, model.decode(states[:, :8]))
        output = model.generate(ids, num_flow_steps=0, return_dict_in_generate=True)
        expected = model.most_likely(model.decode(states[:, :8]), states[:, :8])
        assert torch.equal(output.sequences[:, 6:], expected[:, : output.sequences.shape[1] - 6])
        assert output.num_trunk_passes == 0
        assert output.trajectory is output.gate is output.experts is None

    def test_one_pass_is_trained_without_the_flow(self, make_lively_model):
        fields = {"num_flow_steps": 0, "min_train_flow_steps": 0, "max_train_flow_steps": 0, "crf_rank": 4}
        model = make_lively_model(num_answer_slots=8, **fields)
        ids, labels = torch.randint(4, 64, (2, 6)), torch.randint(4, 64, (2, 8))
        output = model(ids, labels=labels)
        torch.testing.assert_close(output.logits, model(ids).logits)
        expected = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(output.ce_loss, expected)
        torch.testing.assert_close(output.loss, output.ce_loss + output.crf_loss)
        model.train()(ids, labels=labels).loss.backward()
        trained = {name.split(".")[0] for name, each in model.named_parameters() if each.grad is not None}
        assert trained == {"model", "decoder", "lm_head", "transitions"}
        assert torch.equal(model.eval().generate(ids), model.generate(ids, num_flow_steps=0))

    @pytest.mark.parametrize(
        "fields", [{"num_experts": 1}, {"min_train_flow_steps": 0, "max_train_flow_steps": 0}, {"refine_draft": True}]
    )
    def test_every_trained_parameter_gets_a_gradient(self, make_lively_model, fields):
        """Several processes would wait for one that does not."""
        fields = {
            "num_answer_slots": 8,
            "crf_rank": 4,
            "mse_weight": 0.0,
            **fields,
        }
        model = make_lively_model(**fields).train()
        model(torch.randint(4, 64, (2, 6)), labels=torch.randint(4, 64, (2, 8))).loss.backward()
        names = [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
        assert names == []

    @pytest.mark.parametrize("scope", SCOPES)
    def test_a_fresh_flow_that_refines_the_draft_changes_nothing(self, make_model, scope):
        fields = {"expert_scope": scope, "crf_rank": 4, "initializer_range": 0.3}
        model, ids = make_model(**REFINING, **fields), torch.randint(4, 64, (2, 6))
        draft = model(ids, num_flow_steps=0).logits
        for num_flow_steps in (1, 3):
            torch.testing.assert_close(model(ids, num_flow_steps=num_flow_steps).logits, draft)
        drawn = model.generate(ids, num_flow_steps=3, do_sample=True, seed=0, return_prompt=False)
        assert drawn.shape[1] <= 8
        with torch.no_grad():
            model.flow.experts.heads.down_proj.normal_()
        changed = model(ids, num_flow_steps=1).logits
        assert not torch.allclose(changed, draft)
        assert not torch.allclose(changed, model(ids, num_flow_steps=3).logits)

    @pytest.mark.parametrize("share", [True, False])
    def test_experts_that_refine_the_draft_are_different_after_one_update(self, make_model, share):
        fields = {"num_experts": 3, "expert_scope": "sequence", "share_expert_head": share}
        model = make_model(**REFINING, **fields).train()
        ids, labels = torch.randint(4, 64, (6, 5)), torch.randint(4, 64, (6, 8))
        model(ids, labels=labels, num_flow_steps=1).loss.backward()
        torch.optim.SGD(model.parameters(), 1.0).step()
        options = {"expert_choice": "ranked", "num_return_sequences": 3, "return_dict_in_generate": True}
        paths = model.eval().generate(ids[:1], num_flow_steps=1, **options).trajectory[0]
        assert (paths[0, -1] - paths[1:, -1]).abs().amax((1, 2)).min() > 1e-4

    def test_a_flow_is_not_loaded_to_refine_a_draft_unless_it_has_learned_to(self, make_model, tmp_path):
        make_model(**REFINING).save_pretrained(tmp_path / "refines")
        make_model(**{**REFINING, "refine_draft": False}).save_pretrained(tmp_path / "plain")
        for name, wanted in (("refines", False), ("plain", True)):
            for loader in (YanForFlowGeneration, AutoModelForCausalLM):
                assert loader.from_pretrained(tmp_path / name).config.refine_draft is not wanted
                with pytest.raises(ValueError, match=f"refine_draft={wanted}: must be {not wanted}, with which"):
                    loader.from_pretrained(tmp_path / name, refine_draft=wanted)
        config = YanConfig.from_pretrained(tmp_path / "plain", refine_draft=True)
        with pytest.raises(ValueError, match="refine_draft=True: must be False"):
            YanForFlowGeneration.from_pretrained(tmp_path / "plain", config=config)
        model = make_model(**REFINING)
        with pytest.raises(ValueError, match="refine_draft=True: must be False for velocities"):
            model.flow.velocities(torch.zeros(1, 8, 32), torch.zeros(1, 8, 32))

    def test_a_canvas_wider_than_the_draft_to_refine_is_refused(self, make_model):
        model, ids = make_model(**REFINING), torch.randint(4, 64, (2, 6))
        message = "canvas_length=9: must be at most num_answer_slots=8 with refine_draft=True"
        with pytest.raises(ValueError, match=message):
            model(ids, canvas_length=9)
        with pytest.raises(ValueError, match=message):
            model(ids, labels=ids.flip(1), canvas_length=9)
        with pytest.raises(ValueError, match=message):
            model.generate(ids, canvas_length=9)

    def test_there_is_no_draft_without_slots(self, tiny_model):
        with pytest.raises(ValueError, match="num_flow_steps=0: must be at least 1 with num_answer_slots=0"):
            tiny_model.generate(torch.tensor([[5, 6]]), num_flow_steps=0)

    def test_they_take_room_from_the_prompt(self, make_model):
        model = make_model(num_answer_slots=8)
        assert model.generate(torch.full((1, 40), 5)).shape[1] > 40
        with pytest.raises(
            ValueError, match="the prompt has 41 tokens: must be 1 to max_position_embeddings=48 - num_"
        ):
            model.generate(torch.full((1, 41), 5))

    def test_a_long_text_keeps_the_end_of_its_prompt(self, make_lively_model):
        model = make_lively_model(num_answer_slots=8)
        model.lm_head.bias.data[2] = -1e4  # no EOS
        assert model.generate(torch.full((1, 38), 5), max_new_tokens=20).shape == (1, 58)

    def test_stage_one_learns_in_the_same_slots(self, make_config):
        config = make_config(num_answer_slots=8)
        assert config.max_prompt_length == 40
        YanForAutoencoding(config)


def test_a_model_without_gradients_writes_what_forward_says(make_lively_model):
    model, ids = make_lively_model(expert_scope="sequence", **SLOTS), torch.randint(4, 64, (3, 6))
    output = model(ids)
    written = model.generate(ids, return_prompt=False)
    assert torch.equal(model.most_likely(output.logits, output.latents)[:, : written.shape[1]], written)


def test_the_information_of_experts_is_told_and_not_trained(make_lively_model):
    model, ids = make_lively_model(expert_scope="sequence"), torch.randint(4, 64, (2, 6))
    output = model(ids, labels=ids.flip(0))
    assert output.expert_information > 0
    assert not output.expert_information.requires_grad
    assert model.loss_terms["expert_information"] == output.expert_information
    terms = {name: term for name, term in output.items() if name.endswith("_loss")}
    weights = {name: getattr(model.config.objective, name.replace("_loss", "_weight")) for name in terms}
    torch.testing.assert_close(output.loss, sum(weights[name] * term for name, term in terms.items()))
    one = make_lively_model(expert_scope="sequence", num_experts=1)
    assert one(ids, labels=ids.flip(0)).expert_information is None


@pytest.mark.parametrize("scope", SCOPES)
def test_sampling_draws_experts_and_zero_temperature_does_not(make_lively_model, scope):
    model, ids = make_lively_model(expert_scope=scope), torch.randint(4, 64, (1, 6))
    options = {"do_sample": True, "num_return_sequences": 16, "return_prompt": False, "seed": 3}
    warm, again = (model.generate(ids, **options) for _ in range(2))
    assert torch.equal(warm, again)
    assert len(warm.unique(dim=0)) > 1
    assert len(model.generate(ids, temperature=0.0, **options).unique(dim=0)) == 1


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_experts_are_drawn_together_with_their_best_texts(make_lively_model, temperature):
    """The best one of every text of every expert."""
    model = make_lively_model(expert_scope="sequence", crf_rank=4, crf_candidates=3)
    nn.init.normal_(model.transitions.to_proj.weight)
    ends, gate, uniform = torch.randn(1, 3, 3, 32), torch.randn(1, 1, 3).log_softmax(-1), torch.rand(256, 3, 3)
    plan = replace(CanvasPlan.of_config(model.config, 1), expert_choice="sample", temperature=temperature, eos=())
    noise = CanvasNoise(torch.empty(0), uniform, None, torch.rand(256, 3, 3))
    prior = YanExpertPrior("sequence", gate.expand(256, 3, 3))
    _, found = model.expert_choice(plan, noise)(prior, ends.expand(256, -1, -1, -1))
    weights = []
    for expert in range(3):
        latents = ends[:, :, expert]
        _, (emissions, transitions), _ = model.transitions._chain(
            model.get_input_embeddings(), model.decode(latents), latents, ()
        )
        paths = [torch.tensor([path]) for path in product(range(3), repeat=3)]
        scores = torch.cat([path_score(emissions, transitions, path) for path in paths])
        best = scores.log_softmax(0).max()
        weights.append(gate[0, 0, expert] + (1 / max(temperature, 1e-4) - 1) * (gate[0, 0, expert] + best))
    expected = (torch.stack(weights) - torch.log(-torch.log(uniform[:, 0]))).argmax(-1)
    assert torch.equal(found, expected.unsqueeze(1).expand(-1, 3))
    assert len(found.unique()) > 1 or temperature == 0


def test_options_that_do_not_fit_are_refused(make_lively_model):
    sequence, token = make_lively_model(expert_scope="sequence"), make_lively_model(train_expert_choice="sample")
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match=r"length_penalty=2.0: must be 1 without train_expert_choice='posterior'"):
        token.generate(ids, length_penalty=2.0)
    sequence.generate(ids, length_penalty=2.0)
    lone = make_lively_model(expert_scope="sequence", num_experts=1)
    with pytest.raises(ValueError, match=r"length_penalty=2.0: must be 1 without a CRF, a graph, or experts with"):
        lone.generate(ids, length_penalty=2.0)
    with pytest.raises(ValueError, match="length_penalty='long': must be a finite number"):
        sequence.generate(ids, length_penalty="long")


def test_the_length_penalty_is_saved_with_a_model(make_lively_model, tmp_path):
    chain = {"crf_rank": 4, "crf_candidates": 64}
    model, ids = make_lively_model(**chain), torch.randint(4, 64, (4, 6))
    lengths = []
    for penalty in (-8.0, 8.0):
        model.generation_config.length_penalty = penalty
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert torch.equal(loaded.generate(ids), model.generate(ids))
        lengths.append((loaded.generate(ids, return_prompt=False) > 2).sum())
    assert lengths[0] < lengths[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_scope": "chain"}, "expert_scope='chain': must be one of token, sequence; version 0.2 was the last"),
        ({"num_answer_slots": 1024}, "num_answer_slots=1024: must be 0 to below max_position_embeddings=1024"),
        ({"num_answer_slots": 4, "mask_token_id": None}, "num_answer_slots=4: must be 0 to below"),
        ({"copy_prompt_to_slots": True}, "copy_prompt_to_slots=True: must be False with num_answer_slots=0"),
        (
            {"refine_draft": True, "num_answer_slots": 8},
            "refine_draft=True: must be False without answer slots for the",
        ),
        ({"draft_weight": -1.0}, "draft_weight=-1.0: must be at least 0"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        YanConfig(**fields)

"""What makes the tokens of one text fit each other: experts that share the targets out.

Of the three targets of one prompt, two begin alike (0.3 + 0.3 of the rows), the third ends in the likeliest tokens
(0.4): a model whose tokens know nothing of each other writes a text that was never seen.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling_yan.flow_matching_yan import as_one_token, mixture_nll, text_posterior

TARGETS = torch.tensor([[5, 6, 7]] * 3 + [[5, 8, 9]] * 3 + [[10, 11, 12]] * 4)
SEEN = {tuple(target) for target in TARGETS.tolist()}
CANVAS = 4


@pytest.fixture
def variant():
    """These parts are outside the mixers: one variant will do."""
    return "attention"


@pytest.fixture
def make_lively_model(make_model):
    """Function from overrides to a model whose tokens depend on all that the flow sees."""

    def make(**overrides):
        model = make_model(**{"initializer_range": 0.3, **overrides})
        for name, parameter in model.flow.named_parameters():
            if name.endswith("proj.weight") and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        model.lm_head.bias.data[:4] = -1e4  # no special tokens
        return model

    return make


def trained_on_targets(make_model, **overrides):
    sizes = {"num_encoder_layers": 1, "canvas_length": CANVAS, "initializer_range": 0.08}
    model = make_model(**sizes, **overrides).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        labels = TARGETS[torch.randint(len(TARGETS), (32,))]
        model(torch.full((32, 3), 20), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def written(model, num_rows=64, **options) -> list[tuple[int, ...]]:
    tokens = model.generate(torch.full((num_rows, 3), 20), do_sample=True, seed=1, return_prompt=False, **options)
    return [tuple(row) for row in tokens[:, :3].tolist()]


class TestExpertsShareTheTargets:
    @pytest.mark.slow
    def test_experts_drawn_without_the_target_mix_the_texts(self, make_model):
        texts = written(trained_on_targets(make_model, num_experts=3))
        assert sum(text in SEEN for text in texts) < 50

    @pytest.mark.slow
    def test_each_of_those_that_know_it_writes_a_text_of_its_own(self, make_model):
        settings = {"expert_scope": "sequence", "train_expert_choice": "likeliest"}
        model = trained_on_targets(make_model, num_experts=3, **settings)
        assert sum(text in SEEN for text in written(model)) >= 60
        drawn = written(model, expert_choice="sample")
        assert sum(text in SEEN for text in drawn) >= 60
        shares = torch.tensor([drawn.count(text) / len(drawn) for text in ((5, 6, 7), (5, 8, 9), (10, 11, 12))])
        assert torch.allclose(shares, torch.tensor([0.3, 0.3, 0.4]), atol=0.2)  # over three sigma of 64 draws


class TestPosterior:
    def test_a_tokens_experts_are_as_probable_as_they_make_it_likely(self):
        likelihood = torch.tensor([[[0.2, 0.6], [0.5, 0.1]]])  # (1 row, 2 tokens, 2 experts)
        found = text_posterior(likelihood.log())
        torch.testing.assert_close(found, torch.tensor([[[0.25, 0.75], [5 / 6, 1 / 6]]]))

    def test_for_a_sequence_the_tokens_likelihoods_are_multiplied(self):
        likelihood = torch.tensor([[[0.2, 0.6], [0.5, 0.1]]])  # 0.10 and 0.06 together
        found = text_posterior(likelihood.log(), "sequence")
        torch.testing.assert_close(found, torch.tensor([[[0.625, 0.375]] * 2]))

    @pytest.mark.parametrize("scope", ["token", "sequence"])
    def test_the_gate_learns_it_and_the_likeliest_is_chosen(self, make_lively_model, scope):
        settings = {"train_expert_choice": "likeliest", "expert_scope": scope, "expert_exploration": 0.0}
        model = make_lively_model(decoder_dropout=0.0, **settings).train()
        ids, labels = torch.randint(4, 64, (64, 6)), torch.randint(4, 64, (64, 8))
        x_0 = model.start_noise((64, 8), model.lm_head.weight)
        model._draw_path = lambda x_1, rows: (x_0, torch.zeros(64))
        chosen, group = [], model.flow.experts.group
        model.flow.experts.group = lambda experts: chosen.append(experts) or group(experts)
        output = model(ids, labels=labels)

        condition = model.condition(model.model(ids).last_hidden_state, canvas_length=8)
        modulation = model.flow.modulation(torch.zeros(1))
        states = model.flow.trunk(x_0, model._positions(8), modulation, condition)
        ends = x_0.unsqueeze(2) + model.flow.velocities(states, x_0)
        likelihood = model.decode(ends).log_softmax(-1).gather(-1, labels.view(64, 8, 1, 1).expand(-1, -1, 4, 1))
        joint = likelihood.squeeze(-1)
        joint = joint if scope == "token" else joint.sum(1, keepdim=True).expand(-1, 8, -1)
        odds = (joint - joint.amax(-1, keepdim=True)).exp()
        posterior = odds / odds.sum(-1, keepdim=True)
        log_gate = model.flow.log_gate(states, modulation, condition)
        torch.testing.assert_close(output.gate_loss, -(posterior * log_gate).sum(-1).mean(), rtol=1e-4, atol=1e-5)
        assert torch.equal(chosen[0], posterior.argmax(-1))

        model.config.gate_weight = 3.0
        steps = model.config.max_train_flow_steps
        heavier = model(ids, labels=labels, num_flow_steps=steps)
        model.config.gate_weight = 1.0
        lighter = model(ids, labels=labels, num_flow_steps=steps)
        torch.testing.assert_close(heavier.loss - lighter.loss, 2 * lighter.gate_loss, rtol=1e-3, atol=1e-4)

    def test_some_experts_are_drawn_evenly(self, make_model):
        model, velocity = make_model(expert_exploration=0.2), SimpleNamespace()
        one_hot = nn.functional.one_hot(torch.zeros(1, 2000).long(), 4).float()
        model._expert_log_likelihood = lambda ends, canvas: 50 * one_hot
        counts = model._choose_likeliest(None, None, None, velocity).flatten().bincount(minlength=4)
        assert (counts / 2000 - torch.tensor([0.85, 0.05, 0.05, 0.05])).abs().max() < 0.03

    def test_only_this_choice_has_the_gates_loss(self, make_model):
        ids = torch.randint(4, 64, (3, 6))
        assert make_model().train()(ids, labels=ids.flip(1)).gate_loss is None
        model = make_model(train_expert_choice="likeliest")
        assert model.train()(ids, labels=ids.flip(1)).gate_loss > 0
        assert model.eval()(ids, labels=ids.flip(1)).gate_loss is None  # nothing is drawn

    def test_the_likelihood_of_a_sequence_is_a_mixture_of_products(self):
        target, velocities = torch.randn(3, 4, 5), torch.randn(3, 4, 2, 5)
        log_gate = torch.randn(3, 1, 2).log_softmax(-1).expand(-1, 4, -1)
        components = torch.distributions.Normal(velocities, 0.7).log_prob(target.unsqueeze(2)).sum((1, 3))
        expected = -torch.logsumexp(components + log_gate[:, 0], dim=-1).mean()
        found = mixture_nll(*as_one_token(target, velocities, log_gate), 0.7)
        torch.testing.assert_close(found, expected)


class TestOneExpertForASequence:
    @pytest.mark.parametrize("choice", ["argmax", "sample"])
    def test_all_tokens_have_it(self, make_lively_model, choice):
        model, prompts = make_lively_model(expert_scope="sequence"), torch.randint(4, 64, (40, 5))
        options = {"expert_choice": choice, "do_sample": choice == "sample", "seed": 3}
        output = model.generate(prompts, return_dict_in_generate=True, **options)
        (experts,), (gate,) = output.experts, output.gate
        assert torch.equal(experts, experts[:, :1].expand_as(experts))
        torch.testing.assert_close(gate, gate[:, :1].expand_as(gate))
        assert len(experts.unique()) > 1

    def test_it_does_not_depend_on_batch_mates(self, make_lively_model):
        model, prompts = make_lively_model(expert_scope="sequence"), torch.randint(4, 64, (6, 5))
        assert torch.equal(model.generate(prompts)[4:], model.generate(prompts[4:]))

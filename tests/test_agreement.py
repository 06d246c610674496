"""What makes the tokens of one text fit each other: experts that share the targets out, and settled tokens.

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


class TestSettledTokens:
    @pytest.fixture
    def model(self, make_lively_model):
        return make_lively_model(self_conditioning=True)

    @pytest.fixture
    def prompts(self):
        return torch.randint(4, 64, (6, 7))

    def test_a_fresh_model_does_not_see_them(self, make_model, prompts):
        tokens = make_model(self_conditioning=True).generate(prompts)
        assert torch.equal(tokens, make_model(self_conditioning=True).generate(prompts, commit_threshold="off"))

    def test_the_next_step_sees_those_of_the_step_before(self, model, prompts):
        """What `generate` does, written down for two steps."""
        condition = model.condition(model.model(prompts).last_hidden_state, canvas_length=8)
        velocity = model.velocity_field(condition, 8, 2)
        x = model.start_noise((1, 8), condition.mean).expand(6, -1, -1)
        x_half = x + velocity(x, 0.0) / 2
        probabilities = model.decode(x + velocity(x, 0.0)).softmax(-1)
        highest, tokens = probabilities.max(-1)
        is_sure = highest >= 0.8
        is_first = ~is_sure & torch.cat([torch.ones(6, 1, dtype=torch.bool), is_sure[:, :-1]], dim=1)
        assert 0 < is_sure.sum() < is_sure.numel()
        assert (~(is_sure | is_first)).any()
        velocity.settled = model.settle(tokens, is_sure | is_first)
        expected = model.decode(x_half + velocity(x_half, 0.5) / 2).argmax(-1)
        options = {"num_flow_steps": 2, "return_prompt": False}
        found = model.generate(prompts, commit_threshold=0.8, **options)
        assert torch.equal(found, expected)
        assert not torch.equal(found, model.generate(prompts, commit_threshold="off", **options))

    def test_forbidden_tokens_are_not_settled(self, model, prompts):
        likely = model.generate(prompts, num_flow_steps=1, return_prompt=False).unique().tolist()
        seen = []
        settle = model.settle
        model.settle = lambda tokens, is_settled: seen.append(tokens) or settle(tokens, is_settled)
        model.generate(prompts, suppress_tokens=likely[:-1])
        assert len(seen) == 2  # after the first and the second of three steps
        assert not torch.isin(torch.stack(seen), torch.tensor(likely[:-1])).any()

    def test_neither_batch_mates_nor_padding_matter(self, model, prompts):
        whole = model.generate(prompts, return_prompt=False)
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompts[4:]], dim=1)
        assert torch.equal(model.generate(padded, return_prompt=False), whole[4:])

    def test_training_shows_a_part_of_the_target_from_some_step_on(self, model, prompts):
        labels, shown = torch.randint(4, 64, (6, 8)), []
        settle = model.settle
        model.settle = lambda tokens, is_settled: shown.append(is_settled) or settle(tokens, is_settled)
        model.train()
        for _ in range(20):
            shown.clear()
            model(prompts, labels=labels, num_flow_steps=3)
            _, *steps = shown  # the first is the likelihood's
            assert len(steps) == 3
            assert not (steps[0] & ~steps[1]).any()  # once shown, always shown
        model.eval()
        shown.clear()
        model(prompts, labels=labels)
        assert not shown

    @pytest.mark.parametrize("threshold", [-0.1, 1.1, True, "on", float("nan")])
    def test_a_threshold_is_a_probability(self, model, prompts, threshold):
        with pytest.raises(ValueError, match=f"commit_threshold={threshold!r}: must be 0 to 1"):
            model.generate(prompts, commit_threshold=threshold)

    def test_a_checkpoint_without_these_parts_can_get_them(self, make_model, prompts, tmp_path):
        plain = make_model()
        plain.save_pretrained(tmp_path)
        model = type(plain).from_pretrained(tmp_path, self_conditioning=True)
        assert torch.equal(model.generate(prompts), plain.generate(prompts))

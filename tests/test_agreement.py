"""What makes the tokens of one text fit each other: experts that share the targets out.

Of the three targets of one prompt, two begin alike (0.3 + 0.3 of the rows), the third ends in the likeliest tokens
(0.4): a model whose tokens know nothing of each other writes a text that was never seen.
"""

import pytest
import torch
from torch import nn

from modeling_yan.flow_matching_yan import as_one_token, mixture_nll

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


class TestLikelihood:
    def test_the_likelihood_of_a_sequence_is_a_mixture_of_products(self):
        target, velocities = torch.randn(3, 4, 5), torch.randn(3, 4, 2, 5)
        gate_log_probs = torch.randn(3, 1, 2).log_softmax(-1).expand(-1, 4, -1)
        components = torch.distributions.Normal(velocities, 0.7).log_prob(target.unsqueeze(2)).sum((1, 3))
        expected = -torch.logsumexp(components + gate_log_probs[:, 0], dim=-1).mean()
        found = mixture_nll(*as_one_token(target, velocities, gate_log_probs), 0.7)
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

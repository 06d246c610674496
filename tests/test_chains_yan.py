"""Chains against enumeration: all paths of a few states are few enough to count."""

from itertools import product

import pytest
import torch

from modeling_yan.chains_yan import (
    IMPOSSIBLE,
    as_markov,
    best_ending,
    best_path,
    draw_path,
    log_partition,
    path_score,
)
from modeling_yan.experts_yan import YanExpertPrior

BATCH, LENGTH, STATES = 2, 4, 3


def random_chain():
    """Log-probabilities of a Markov chain: of the first token's states, and of the others' given the one before."""
    first = torch.randn(BATCH, STATES).log_softmax(-1)
    return first, torch.randn(BATCH, LENGTH - 1, STATES, STATES).log_softmax(-1)


def all_paths():
    return torch.tensor(list(product(range(STATES), repeat=LENGTH)))


def probabilities(first, transitions, row):
    """Probability of every path of `all_paths`, in a row."""
    paths = all_paths()
    log_probability = first[row][paths[:, 0]]
    for step in range(LENGTH - 1):
        log_probability = log_probability + transitions[row, step][paths[:, step], paths[:, step + 1]]
    return log_probability.exp()


def test_paths_are_drawn_as_often_as_they_are_probable():
    first, transitions = random_chain()
    num = 100_000
    drawn = draw_path(
        first[:1].expand(num, -1), transitions[:1].expand(num, -1, -1, -1), torch.rand(num, LENGTH, STATES)
    )
    code = (drawn * STATES ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    shares = torch.bincount(code, minlength=STATES**LENGTH) / num
    assert (shares - probabilities(first, transitions, 0)).abs().max() < 0.006


def test_a_drawn_path_is_a_function_of_its_numbers():
    first, transitions = random_chain()
    numbers = torch.rand(1, LENGTH, STATES)
    both = draw_path(first, transitions, numbers)
    assert torch.equal(both[1:], draw_path(first[1:], transitions[1:], numbers))


def test_a_chain_of_one_token():
    first, transitions = torch.randn(2, STATES).log_softmax(-1), torch.empty(2, 0, STATES, STATES)
    certain = torch.full((1, 1, STATES), 0.5)
    assert torch.equal(draw_path(first, transitions, certain).squeeze(1), first.argmax(-1))


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_the_best_ending_is_that_of_the_best_path_per_token(length_penalty):
    for _ in range(5):
        # log-probabilities, which are at most 0
        tokens, fill = torch.randn(2, BATCH, LENGTH, STATES).log_softmax(-1)
        transitions = torch.randn(BATCH, LENGTH - 1, STATES, STATES).log_softmax(-1)
        found = best_ending(tokens, fill, transitions, length_penalty)
        shifted = best_ending(tokens + 9, fill + 9, transitions, length_penalty, torch.full((BATCH,), 9.0 * LENGTH))
        assert torch.equal(found, shifted)
        for row in range(BATCH):
            scores = []
            for length in range(LENGTH + 1):
                emissions = torch.where(torch.arange(LENGTH).unsqueeze(1) < length, tokens[row], fill[row])
                paths = all_paths()
                chain = emissions.expand(len(paths), -1, -1), transitions[row].expand(len(paths), -1, -1, -1)
                scores.append(path_score(*chain, paths).max() / (length + 1) ** length_penalty)
            assert found[row] == torch.stack(scores).argmax()


def test_no_penalty_makes_an_impossible_ending_the_best_one():
    tokens, fill = torch.randn(2, BATCH, LENGTH, STATES).log_softmax(-1)
    transitions = torch.randn(BATCH, LENGTH - 1, STATES, STATES).log_softmax(-1)
    fill[:, :2], tokens[:, -1] = IMPOSSIBLE, -torch.inf  # it has two tokens or more, and not all of them
    for length_penalty in (-1e6, -3.0, 0.0, 60.0, 1e6):
        found = best_ending(tokens, fill, transitions, length_penalty)
        assert 2 <= found.min() <= found.max() < LENGTH
    assert (best_ending(tokens, fill, transitions, 1e6) == LENGTH - 1).all()


class TestPrior:
    @pytest.fixture(params=["token", "sequence"])
    def prior(self, request):
        gate = torch.randn(BATCH, LENGTH, STATES).log_softmax(-1)
        gate = gate[:, :1].expand_as(gate) if request.param == "sequence" else gate
        return YanExpertPrior(request.param, gate)

    def counted(self, prior, log_likelihood, row):
        """Log-probability of every choice of experts, and of the text that they write."""
        if prior.scope == "sequence":
            return prior.gate_log_probs[row, 0], log_likelihood[row].sum(0)
        chosen = torch.arange(LENGTH), all_paths()
        return prior.gate_log_probs[row][chosen].sum(1), log_likelihood[row][chosen].sum(1)

    def test_the_evidence_sums_over_all_choices_of_experts(self, prior):
        log_likelihood = torch.randn(BATCH, LENGTH, STATES)
        found = prior.log_evidence(log_likelihood)
        for row in range(BATCH):
            weights, texts = self.counted(prior, log_likelihood, row)
            torch.testing.assert_close(found[row], (weights + texts).logsumexp(0))

    def test_the_posterior_weighs_experts_by_the_text(self, prior):
        log_likelihood = torch.randn(BATCH, LENGTH, STATES)
        posterior = prior.posterior(log_likelihood)
        for row in range(BATCH):
            weights, texts = self.counted(prior, log_likelihood, row)
            found, _ = self.counted(posterior, log_likelihood, row)
            torch.testing.assert_close(found, (weights + texts).log_softmax(0))

    def test_the_information_is_what_the_text_says_of_its_experts(self, prior):
        log_likelihood = torch.randn(BATCH, LENGTH, STATES)
        found = prior.information(log_likelihood)
        for row in range(BATCH):
            weights, texts = self.counted(prior, log_likelihood, row)
            posterior = (weights + texts).log_softmax(0)
            torch.testing.assert_close(found[row], (posterior.exp() * (posterior - weights)).sum())
        alike = log_likelihood[..., :1].expand_as(log_likelihood)
        torch.testing.assert_close(prior.information(alike), torch.zeros(BATCH))

    def test_temperature_sharpens_the_draws(self, prior):
        numbers = torch.rand(200, LENGTH, STATES)
        cold = [prior.tempered(0.0).choose("sample", numbers[i : i + 1]) for i in range(200)]
        assert all(torch.equal(experts, cold[0]) for experts in cold)
        warm = {tuple(prior.choose("sample", numbers[i : i + 1])[0].tolist()) for i in range(200)}
        assert len(warm) >= (STATES if prior.scope == "sequence" else 10)


def test_without_emissions_the_paths_of_a_chain_sum_to_one():
    first, transitions = random_chain()
    emissions = torch.cat([first.unsqueeze(1), torch.zeros(BATCH, LENGTH - 1, STATES)], dim=1)
    torch.testing.assert_close(log_partition(emissions, transitions), torch.zeros(BATCH), atol=1e-5, rtol=0)


def test_a_chain_of_scores_is_a_markov_chain():
    emissions, transitions = torch.randn(BATCH, LENGTH, STATES), torch.randn(BATCH, LENGTH - 1, STATES, STATES)
    first, after = as_markov(emissions, transitions)
    total = log_partition(emissions, transitions)
    for row in range(BATCH):
        paths = all_paths()
        chain = emissions[row].expand(len(paths), -1, -1), transitions[row].expand(len(paths), -1, -1, -1)
        expected = (path_score(*chain, paths) - total[row]).exp()
        torch.testing.assert_close(probabilities(first, after, row), expected)


def test_a_markov_chain_of_one_token():
    first, after = as_markov(torch.randn(2, 1, STATES), torch.empty(2, 0, STATES, STATES))
    assert after.shape == (2, 0, STATES, STATES)
    torch.testing.assert_close(first.exp().sum(-1), torch.ones(2))


@pytest.mark.parametrize("length", [2, 5, 8])
def test_both_ways_through_a_chain_agree(length, monkeypatch):
    """Token by token, as on a CPU, and by halves, as on an accelerator."""
    emissions = torch.randn(3, length, 6, dtype=torch.float64, requires_grad=True)
    transitions = torch.randn(3, length - 1, 6, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for by_tokens in (True, False):
        monkeypatch.setattr("modeling_yan.chains_yan._goes_by_tokens", lambda _, choice=by_tokens: choice)
        total = log_partition(emissions, transitions)
        gradients = torch.autograd.grad(total.sum(), (emissions, transitions))
        results.append((total, *gradients, best_path(emissions, transitions)))
    torch.testing.assert_close(*results)

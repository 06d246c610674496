"""Chains against enumeration: all paths of a few states are few enough to count."""

from itertools import product

import pytest
import torch

from modeling_yan.chains_yan import (
    IMPOSSIBLE,
    as_markov,
    best_ending,
    best_path,
    chain_marginals,
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


def test_marginals_are_sums_over_paths():
    first, transitions = random_chain()
    found = chain_marginals(first, transitions).exp()
    for row in range(BATCH):
        weights = probabilities(first, transitions, row)
        for token, state in product(range(LENGTH), range(STATES)):
            expected = weights[all_paths()[:, token] == state].sum()
            torch.testing.assert_close(found[row, token, state], expected)


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
    assert torch.equal(chain_marginals(first, transitions), first.unsqueeze(1))


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
    @pytest.fixture
    def chain(self):
        first, transitions = random_chain()
        gate_log_probs = torch.cat([first.unsqueeze(1), torch.randn(BATCH, LENGTH - 1, STATES).log_softmax(-1)], dim=1)
        return YanExpertPrior("chain", gate_log_probs, transitions)

    def test_evidence_of_a_chain_sums_over_its_paths(self, chain):
        log_likelihood = torch.randn(BATCH, LENGTH, STATES)
        found = chain.log_evidence(log_likelihood)
        for row in range(BATCH):
            weights = probabilities(chain.gate_log_probs[:, 0], chain.log_transitions, row)
            texts = log_likelihood[row][torch.arange(LENGTH), all_paths()].sum(1).exp()
            torch.testing.assert_close(found[row], (weights * texts).sum().log())

    def test_a_chain_whose_transitions_forget_is_a_mixture_of_every_token(self, chain):
        forgetful = chain.gate_log_probs[:, 1:].unsqueeze(2).expand(-1, -1, STATES, -1)
        log_likelihood = torch.randn(BATCH, LENGTH, STATES)
        chained = YanExpertPrior("chain", chain.gate_log_probs, forgetful).log_evidence(log_likelihood)
        torch.testing.assert_close(chained, YanExpertPrior("token", chain.gate_log_probs).log_evidence(log_likelihood))

    def test_a_chain_whose_expert_stays_is_a_mixture_of_sequences(self, chain):
        stays = (torch.eye(STATES) + 1e-30).log().expand(BATCH, LENGTH - 1, -1, -1)
        log_likelihood = torch.randn(BATCH, LENGTH, STATES)
        chained = YanExpertPrior("chain", chain.gate_log_probs, stays).log_evidence(log_likelihood)
        torch.testing.assert_close(
            chained, YanExpertPrior("sequence", chain.gate_log_probs).log_evidence(log_likelihood)
        )

    def test_the_posterior_weighs_paths_by_the_text(self, chain):
        log_likelihood = torch.randn(BATCH, LENGTH, STATES)
        posterior = chain.posterior(log_likelihood)
        for row in range(BATCH):
            weights = probabilities(chain.gate_log_probs[:, 0], chain.log_transitions, row)
            joint = weights * log_likelihood[row][torch.arange(LENGTH), all_paths()].sum(1).exp()
            found = probabilities(posterior.gate_log_probs[:, 0], posterior.log_transitions, row)
            torch.testing.assert_close(found, joint / joint.sum())

    @pytest.mark.parametrize("scope", ["token", "sequence", "chain"])
    def test_the_information_is_what_the_text_says_of_its_experts(self, chain, scope):
        log_likelihood = torch.randn(BATCH, LENGTH, STATES)
        gate = chain.gate_log_probs
        gate = gate[:, :1].expand_as(gate) if scope == "sequence" else gate
        prior = YanExpertPrior(scope, gate, chain.log_transitions if scope == "chain" else None)
        found = prior.information(log_likelihood)
        for row in range(BATCH):
            if scope == "chain":
                weights = probabilities(chain.gate_log_probs[:, 0], chain.log_transitions, row)
                texts = log_likelihood[row][torch.arange(LENGTH), all_paths()].sum(1)
            elif scope == "sequence":
                weights, texts = gate[row, 0].exp(), log_likelihood[row].sum(0)
            else:
                weights = gate[row][torch.arange(LENGTH), all_paths()].sum(1).exp()
                texts = log_likelihood[row][torch.arange(LENGTH), all_paths()].sum(1)
            posterior = (weights.log() + texts).log_softmax(0)
            expected = (posterior.exp() * (posterior - weights.log())).sum()
            torch.testing.assert_close(found[row], expected)
        alike = log_likelihood[..., :1].expand_as(log_likelihood)
        torch.testing.assert_close(prior.information(alike), torch.zeros(BATCH))

    def test_argmax_is_the_most_probable_path_and_not_the_most_probable_states(self):
        first = torch.tensor([[0.4, 0.6]]).log()
        after = torch.tensor([[[[0.9, 0.1], [0.5, 0.5]]]]).log()
        gate_log_probs = torch.cat([first.unsqueeze(1), torch.zeros(1, 1, 2)], dim=1)
        assert YanExpertPrior("chain", gate_log_probs, after).choose("argmax").tolist() == [[0, 0]]

    def test_temperature_sharpens_the_draws(self, chain):
        numbers = torch.rand(200, LENGTH, STATES)
        cold = [chain.tempered(0.0).choose("sample", numbers[i : i + 1]) for i in range(200)]
        assert all(torch.equal(path, cold[0]) for path in cold)
        warm = {tuple(chain.choose("sample", numbers[i : i + 1])[0].tolist()) for i in range(200)}
        assert len(warm) > 10

    def test_ranks_are_for_no_chain(self, chain):
        with pytest.raises(ValueError, match="expert_choice='ranked': must be argmax, sample or mixture"):
            chain.choose("ranked", ranks=torch.zeros(BATCH, 1, dtype=torch.long))

    def test_the_best_chain_ends_once(self, chain):
        tokens, fill = torch.full((BATCH, LENGTH, STATES), -1.0), torch.full((BATCH, LENGTH, STATES), -1.0)
        fill[:, :2] = -50.0
        assert torch.equal(chain.best_chain(tokens), best_path(chain._emissions(tokens), chain.log_transitions))
        assert chain.best_chain(tokens, fill).shape == (BATCH, LENGTH)


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

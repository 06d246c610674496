"""One expert per token: the same numbers as computing all of them, at the cost of one, chosen as the gate says."""

import pytest
import torch

from modeling_yan.experts_yan import YanExperts, YanGate, choose_experts
from modeling_yan.flow_matching_yan import hashed_uniform


@pytest.fixture
def variant():
    return "attention"  # experts and gate know no mixer


@pytest.fixture
def experts(make_config):
    return YanExperts(make_config(num_experts=4, initializer_range=0.3))


def gather_chosen(experts, states, chosen):
    """Velocity of the chosen experts out of the dense computation of all."""
    return experts(states).gather(2, chosen[..., None, None].expand(-1, -1, 1, states.shape[-1])).squeeze(2)


def random_gate(*shape):
    return torch.randn(*shape).log_softmax(-1)


# --- experts


def test_experts_of_any_number_are_equally_large_where_their_widths_add_up_to_the_same(make_config):
    shares = [(1, 256), (2, 128), (4, 64)]
    sizes = [{"num_experts": number, "moe_intermediate_size": width} for number, width in shares]
    assert [YanExperts(make_config(**size)).heads.up_proj.numel() for size in sizes] == [256 * 32] * 3


def test_a_single_expert_needs_no_choice(make_config):
    experts, states = YanExperts(make_config(num_experts=1, initializer_range=0.3)), torch.randn(2, 5, 32)
    dense, groups = experts(states), experts.dispatch(torch.zeros(2, 5, dtype=torch.long))
    assert dense.shape == (2, 5, 1, 32)
    torch.testing.assert_close(experts.combine(states, groups), dense.squeeze(2))
    assert groups.found is None  # not even sorted


@pytest.mark.parametrize("seed", range(3))
def test_experts_of_one_head_are_told_apart_by_their_embedding(make_config, seed):
    torch.manual_seed(seed)
    config = make_config(num_experts=4, share_expert_head=True, initializer_range=0.3)
    experts, states, chosen = YanExperts(config), torch.randn(2, 5, 32), torch.randint(4, (2, 5))
    assert len(experts.heads.up_proj) == 1
    dense, sparse = experts(states), experts.combine(states, experts.dispatch(chosen))
    assert dense.shape == (2, 5, 4, 32)
    torch.testing.assert_close(sparse, gather_chosen(experts, states, chosen))
    for expert in range(4):
        told = states + experts.embedding.weight[expert]
        torch.testing.assert_close(dense[:, :, expert], experts.heads(told).squeeze(2))
    assert not torch.allclose(dense[:, :, 0], dense[:, :, 1])


def test_experts_of_one_head_cost_an_embedding_each(make_config):
    def size(number):
        config = make_config(num_experts=number, share_expert_head=True)
        return sum(weight.numel() for weight in YanExperts(config).parameters())

    assert size(64) - size(2) == 62 * 32
    assert size(1) == size(2) - 2 * 32  # one expert needs not be told which it is


def test_the_mixture_velocity_is_the_gates_mean(experts):
    states, gate_log_probs = torch.randn(2, 5, 32), random_gate(2, 5, 4)
    expected = torch.einsum("blkd,blk->bld", experts(states), gate_log_probs.exp())
    torch.testing.assert_close(experts.mixture_of(states, gate_log_probs), expected)
    certain = (60 * torch.nn.functional.one_hot(torch.full((2, 5), 3), 4).float()).log_softmax(-1)
    torch.testing.assert_close(experts.mixture_of(states, certain), experts(states)[:, :, 3])


# --- choice


def test_argmax_takes_the_most_probable_expert():
    gate_log_probs = random_gate(3, 7, 5)
    assert torch.equal(choose_experts(gate_log_probs, "argmax"), gate_log_probs.exp().argmax(-1))


def test_ranked_takes_the_experts_in_the_order_of_their_probability():
    gate_log_probs = torch.tensor([[[0.2, 0.5, 0.3]], [[0.6, 0.1, 0.3]], [[0.4, 0.4, 0.2]]]).log()
    for rank, expected in enumerate([[1, 0, 0], [2, 2, 1], [0, 1, 2]]):
        assert choose_experts(gate_log_probs, "ranked", ranks=torch.full((3, 1), rank)).flatten().tolist() == expected


def test_mixture_takes_none():
    assert choose_experts(random_gate(3, 7, 5), "mixture") is None


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match=r"expert_choice='best'.*argmax, ranked, sample, mixture"):
        choose_experts(random_gate(1, 1, 2), "best")


def uniform_numbers(seed, gate_log_probs):
    """None for the global random state, else the numbers of a seed."""
    return None if seed is None else hashed_uniform(seed, gate_log_probs.shape)


@pytest.mark.parametrize("seed", [None, 0, 11])
def test_sampled_experts_are_as_frequent_as_the_gate_says(seed):
    gate = torch.tensor([0.05, 0.1, 0.6, 0.25])
    gate_log_probs = gate.log().expand(20, 1000, 4)
    chosen = choose_experts(gate_log_probs, "sample", uniform_numbers(seed, gate_log_probs))
    frequencies = chosen.flatten().bincount(minlength=4) / chosen.numel()
    assert frequencies.tolist() == pytest.approx(gate.tolist(), abs=0.015)


def test_sampling_follows_each_tokens_own_gate():
    certain = torch.arange(12).view(3, 4) % 5
    gate_log_probs = (200 * torch.nn.functional.one_hot(certain, 5).float()).log_softmax(-1)
    for seed in (None, 1):
        assert torch.equal(choose_experts(gate_log_probs, "sample", uniform_numbers(seed, gate_log_probs)), certain)


def test_given_numbers_decide_the_sample():
    gate_log_probs = random_gate(4, 50, 5)
    numbers = torch.rand(4, 50, 5)
    sample = choose_experts(gate_log_probs, "sample", numbers)
    assert torch.equal(choose_experts(gate_log_probs, "sample", numbers), sample)
    assert torch.equal(choose_experts(gate_log_probs[:2, :20], "sample", numbers[:2, :20]), sample[:2, :20])
    assert not torch.equal(choose_experts(gate_log_probs, "sample", torch.rand(4, 50, 5)), sample)
    for_all_rows = choose_experts(gate_log_probs[:1].expand(4, -1, -1), "sample", numbers[:1])
    assert torch.equal(for_all_rows, for_all_rows[:1].expand(4, -1))


def test_a_number_of_zero_does_no_harm():
    numbers = torch.tensor([0.0, 0.5, 0.25]).expand(1, 1, 3)  # the global random state may give a zero
    assert choose_experts(torch.zeros(1, 1, 3).log_softmax(-1), "sample", numbers).item() == 1


def test_without_numbers_a_sample_follows_the_global_random_state():
    gate_log_probs = random_gate(4, 50, 5)
    torch.manual_seed(1)
    first, second = (choose_experts(gate_log_probs, "sample") for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(choose_experts(gate_log_probs, "sample"), first)
    assert not torch.equal(first, second)


# --- gate


def gate_inputs(batch=3, length=5):
    return torch.randn(batch, length, 32), torch.randn(batch, 32), torch.randn(1, 32)


def test_the_gate_is_a_distribution_over_experts_in_float32(make_config):
    gate = YanGate(make_config(num_experts=3)).to(torch.bfloat16)
    gate_log_probs = gate(*(tensor.to(torch.bfloat16) for tensor in gate_inputs()))
    assert gate_log_probs.dtype == torch.float32
    torch.testing.assert_close(gate_log_probs.exp().sum(-1), torch.ones(3, 5))


def test_the_gates_temperature_divides_its_logits(make_config):
    gate, inputs = YanGate(make_config(num_experts=4)), gate_inputs()
    at_one = gate(*inputs)
    gate.temperature = 0.25
    torch.testing.assert_close(gate(*inputs), (4 * at_one).log_softmax(-1))
    assert YanGate(make_config(gate_temperature=0.25)).temperature == 0.25


def test_the_gate_reads_the_token_the_prompt_and_the_time(make_config):
    gate, (states, prompt_mean, time) = YanGate(make_config()), gate_inputs()
    gate_log_probs = gate(states, prompt_mean, time)
    for row in range(3):  # one time for all rows, or one a row
        alone = gate(states[row : row + 1], prompt_mean[row : row + 1], time)
        torch.testing.assert_close(alone[0], gate_log_probs[row])
    torch.testing.assert_close(gate(states, prompt_mean, time.expand(3, -1)), gate_log_probs)
    other_token = states.clone()
    other_token[0, 2] += 1
    changed = (gate(other_token, prompt_mean, time) - gate_log_probs).abs().sum(-1) > 1e-6
    assert changed.nonzero().tolist() == [[0, 2]]
    assert not torch.allclose(gate(states, prompt_mean + 1, time), gate_log_probs)
    assert not torch.allclose(gate(states, prompt_mean, time + 1), gate_log_probs)


def test_a_single_experts_gate_is_one(make_config):
    assert torch.equal(YanGate(make_config(num_experts=1))(*gate_inputs()), torch.zeros(3, 5, 1))

"""The mathematics of MoE-FM against analytic answers, hand-written float64 and other libraries' formulas."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.nn import functional as F

from modeling_yan import flow_matching_yan
from modeling_yan.flow_matching_yan import (
    MMD_BANDWIDTHS,
    _log_joint,
    gate_entropy,
    gaussian_mmd,
    hashed_normal,
    hashed_uniform,
    interpolate,
    load_balance,
    masked_mean,
    mixture_nll,
    sample_times,
    solve_flow,
    solver_times,
    target_log_probs,
    token_cross_entropy,
    token_log_likelihood,
)


def responsibilities(*mixture) -> torch.Tensor:
    """Posterior gamma_k (B, L, K) of each expert given the target velocity; arguments as in `mixture_nll`."""
    return _log_joint(*mixture).softmax(-1)


def random_mixture(batch=3, length=4, experts=5, dim=6):
    """Target (B, L, D), velocities (B, L, K, D) that take a gradient, and log-gate (B, L, K)."""
    target = torch.randn(batch, length, dim)
    velocities = torch.randn(batch, length, experts, dim, requires_grad=True)
    return target, velocities, torch.randn(batch, length, experts).log_softmax(-1)


def gradient(value, tensor):
    return torch.autograd.grad(value, tensor)[0]


def torch_mixture_nll(target, velocities, gate_log_probs, sigma):
    """The mean negative log-likelihood by torch.distributions, in float64."""
    components = Independent(Normal(velocities.double(), sigma), 1)
    return -MixtureSameFamily(Categorical(logits=gate_log_probs.double()), components).log_prob(target.double()).mean()


# --- the likelihood


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_the_likelihood_and_its_gradient_are_those_of_a_gaussian_mixture(sigma):
    target, velocities, gate_log_probs = random_mixture()
    nll = mixture_nll(target, velocities, gate_log_probs, sigma)
    reference = torch_mixture_nll(target, velocities, gate_log_probs, sigma)
    assert nll.item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(gradient(nll, velocities), gradient(reference, velocities), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_one_expert_is_flow_matching(sigma):
    target, velocity, _ = random_mixture(experts=1)
    squared_error = (target - velocity.squeeze(2)).square().sum(-1).mean()
    nll = mixture_nll(target, velocity, torch.zeros(3, 4, 1), sigma)
    expected = gradient(squared_error / (2 * sigma**2), velocity)
    torch.testing.assert_close(gradient(nll, velocity), expected)


def test_responsibilities_are_the_posterior_of_bayes():
    target, velocities, gate_log_probs = random_mixture(batch=2, length=3, experts=4, dim=2)
    sigma = 0.7
    posterior = responsibilities(target, velocities, gate_log_probs, sigma)
    torch.testing.assert_close(posterior.sum(-1), torch.ones(2, 3))
    for row in range(2):
        for token in range(3):
            joint = []
            for expert in range(4):
                error = target[row, token].tolist(), velocities[row, token, expert].tolist()
                density = math.prod(math.exp(-((a - b) ** 2) / (2 * sigma**2)) for a, b in zip(*error))
                joint.append(math.exp(gate_log_probs[row, token, expert].item()) * density)
            expected = [value / sum(joint) for value in joint]
            assert posterior[row, token].tolist() == pytest.approx(expected, rel=1e-4)


def test_with_a_large_sigma_every_expert_gets_its_gates_share_of_the_gradient():
    target, velocities, gate_log_probs = random_mixture()
    sigma = 1e3
    torch.testing.assert_close(
        responsibilities(target, velocities, gate_log_probs, sigma), gate_log_probs.exp(), atol=1e-4, rtol=0
    )
    scaled = (
        gradient(mixture_nll(target, velocities, gate_log_probs, sigma), velocities)
        * sigma**2
        * target[..., 0].numel()
    )
    expected = gate_log_probs.exp().unsqueeze(-1) * (velocities - target.unsqueeze(-2))
    torch.testing.assert_close(scaled, expected.detach(), atol=1e-3, rtol=1e-3)


def test_with_a_large_sigma_all_experts_come_to_rest_at_the_conditional_mean():
    target = torch.randn(500, 1, 3) + torch.tensor([2.0, 0.0, -1.0])
    gate_log_probs = torch.tensor([0.2, 0.3, 0.5]).log().expand(500, 1, 3)

    def size_of_gradient(points):
        points = points.clone().requires_grad_()
        nll = mixture_nll(target, points.expand(500, 1, 3, 3), gate_log_probs, sigma=1e3)
        return gradient(nll, points).abs().amax(-1) * 1e6

    at_mean = size_of_gradient(target.mean((0, 1)).expand(3, 3))
    elsewhere = size_of_gradient(target.mean((0, 1)) + torch.eye(3))
    assert at_mean.max() < 1e-3
    assert elsewhere.min() > 0.1


def test_with_a_small_sigma_only_the_nearest_expert_learns():
    target, velocities, gate_log_probs = random_mixture()
    nearest = (target.unsqueeze(-2) - velocities).square().sum(-1).argmin(-1)
    one_hot = F.one_hot(nearest, 5).float()
    torch.testing.assert_close(responsibilities(target, velocities, gate_log_probs, 0.01), one_hot)
    learns = gradient(mixture_nll(target, velocities, gate_log_probs, sigma=0.01), velocities).abs().sum(-1) > 0
    assert torch.equal(learns, one_hot.bool())


def fit_two_points(share, sigma):
    """Gate and experts of two components fitted to a target that is (1, 0) with probability `share`, else (-1, 1)."""
    num_first = round(10 * share)
    target = torch.tensor([[1.0, 0.0]] * num_first + [[-1.0, 1.0]] * (10 - num_first)).unsqueeze(1)
    experts = torch.tensor([[0.2, 0.0], [-0.1, 0.1]], requires_grad=True)
    gate_logits = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([experts, gate_logits], lr=0.05)
    for _ in range(500):
        arguments = (target, experts.expand(10, 1, 2, 2), gate_logits.log_softmax(-1).expand(10, 1, 2), sigma)
        optimizer.zero_grad()
        mixture_nll(*arguments).backward()
        optimizer.step()
    gamma = responsibilities(*arguments).detach().squeeze(1)
    return experts.detach(), gate_logits.detach().softmax(-1), gamma, target.squeeze(1)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_the_optimum_has_the_papers_gate_and_velocities(share):
    experts, gate, gamma, target = fit_two_points(share, sigma=0.7)
    assert (experts[0] - experts[1]).norm() > 1  # they have parted, and
    assert 0.001 < gamma.min() < 0.1  # the assignment is soft, so the equations below say something
    torch.testing.assert_close(gate, gamma.mean(0), atol=1e-3, rtol=0)
    conditional_means = (gamma.T @ target) / gamma.sum(0).unsqueeze(-1)
    torch.testing.assert_close(experts, conditional_means, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_likelihood_of_wide_half_precision_latents_is_computed_in_float32(dtype):
    target, velocities, gate_log_probs = random_mixture(experts=3, dim=4096)
    target, velocities = (8 * target).to(dtype), (8 * velocities.detach()).to(dtype).requires_grad_()
    nll = mixture_nll(target, velocities, gate_log_probs.to(dtype), sigma=1.0)
    assert nll.dtype == torch.float32
    assert nll > 65504  # beyond float16's range
    expected = torch_mixture_nll(target, velocities, gate_log_probs.to(dtype), 1.0)
    assert nll.item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradient(nll, velocities).isfinite().all()


# --- masks and averages


@pytest.mark.parametrize(
    "term",
    [
        lambda x, mask: mixture_nll(
            x[..., :6], x[..., 6:].unflatten(-1, (3, 6)), x[..., :3].log_softmax(-1), 1.0, mask
        ),
        lambda x, mask: gate_entropy(x.log_softmax(-1), mask),
        lambda x, mask: load_balance(x.log_softmax(-1), mask),
        lambda x, mask: token_cross_entropy(x, torch.arange(8).view(2, 4), mask),
        lambda x, mask: masked_mean(x[..., 0], mask),
    ],
    ids=["mixture_nll", "gate_entropy", "load_balance", "token_cross_entropy", "masked_mean"],
)
def test_masked_tokens_do_not_matter(term):
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]])
    values = torch.randn(2, 4, 24)
    others = torch.where(mask.bool().unsqueeze(-1), values, 100 * torch.randn(2, 4, 24))
    assert torch.equal(term(values, mask), term(others, mask))
    assert term(values, mask) != term(values, None)
    torch.testing.assert_close(term(values, torch.ones(2, 4)), term(values, None))


def test_a_masked_mean_is_the_mean_of_what_is_left_and_zero_of_nothing():
    values = torch.tensor([[1.0, 2.0, 6.0], [10.0, 20.0, 30.0]])
    assert masked_mean(values, torch.tensor([[1, 0, 1], [0, 0, 0]])) == 3.5
    assert masked_mean(values, torch.zeros(2, 3)) == 0


def test_gate_entropy_of_known_distributions():
    def entropy(logits):
        return gate_entropy(torch.tensor(logits).log_softmax(-1).expand(2, 3, -1)).item()

    assert entropy([0.0] * 8) == pytest.approx(math.log(8))
    assert entropy([50.0, 0.0, 0.0]) == pytest.approx(0, abs=1e-6)
    assert entropy([math.log(0.25), math.log(0.75)]) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


def test_load_balance_is_zero_for_equal_use_and_log_k_for_a_single_expert():
    certain = 50 * F.one_hot(torch.arange(8) % 4, 4).float().view(2, 4, 4)
    assert load_balance(torch.zeros(2, 3, 8).log_softmax(-1)).item() == pytest.approx(0, abs=1e-6)
    assert load_balance(certain.log_softmax(-1)).item() == pytest.approx(0, abs=1e-6)
    assert load_balance(certain[:, :1].log_softmax(-1)).item() == pytest.approx(math.log(4), rel=1e-5)


# --- path and solver


def test_the_path_leads_from_noise_to_data_in_a_straight_line():
    x_0, x_1 = torch.randn(5, 3, 2), torch.randn(5, 3, 2)
    time = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    x_t = interpolate(x_0, x_1, time)
    assert torch.equal(x_t[0], x_0[0])
    assert torch.equal(x_t[4], x_1[4])
    torch.testing.assert_close(x_t[1], x_0[1] + 0.25 * (x_1[1] - x_0[1]))
    torch.testing.assert_close(interpolate(x_0[:, 0], x_1[:, 0], time), x_t[:, 0])
    assert interpolate(x_0.half(), x_1.half(), time).dtype == torch.float16


@pytest.mark.parametrize("num_steps", [1, 3, 7])
def test_a_constant_velocity_is_solved_exactly(num_steps):
    x_0, shift = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(solve_flow(lambda x, t: shift, x_0, num_steps), x_0 + shift)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_a_velocity_of_time_alone_gives_the_sum_of_the_quadrature_rule(num_steps):
    x_0 = torch.zeros(1, dtype=torch.float64)
    solved = solve_flow(lambda x, t: torch.full_like(x, 3 * t**2), x_0, num_steps).item()
    assert solved == pytest.approx((num_steps - 1) * (2 * num_steps - 1) / (2 * num_steps**2))


def test_a_velocity_of_the_state_is_solved_with_the_solvers_order():
    def error(num_steps):
        solved = solve_flow(lambda x, t: x, torch.ones(1, dtype=torch.float64), num_steps).item()
        assert solved == pytest.approx((1 + 1 / num_steps) ** num_steps)
        return math.e - solved

    assert math.log2(error(32) / error(64)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("num_steps", [1, 3, 7])
def test_the_velocity_is_called_as_often_and_at_the_times_that_are_promised(num_steps):
    times, steps = [], []

    def velocity(x, time):
        times.append(time)
        return torch.ones_like(x)

    solve_flow(velocity, torch.zeros(1), num_steps, callback=lambda step, x: steps.append((step, x.item())))
    assert times == solver_times(num_steps)
    assert len(times) == num_steps
    assert [step for step, _ in steps] == list(range(1, num_steps + 1))
    assert [x for _, x in steps] == pytest.approx([step / num_steps for step in range(1, num_steps + 1)])


@pytest.mark.parametrize("num_steps", [0, -1, 1.5, "3", None])
def test_a_number_of_steps_that_is_no_positive_integer_is_refused(num_steps):
    with pytest.raises(ValueError, match=r"num_flow_steps=.*at least 1"):
        solve_flow(lambda x, t: x, torch.zeros(1), num_steps)


# --- noise and times


def test_hashed_noise_does_not_depend_on_the_shape_around_an_element():
    noise = hashed_normal(5, (4, 6, 8))
    assert torch.equal(noise[:2, :3, :5], hashed_normal(5, (2, 3, 5)))
    assert torch.equal(noise, hashed_normal(5, (4, 6, 8)))
    assert noise.dtype == torch.float32


def test_hashed_noise_is_pinned():
    expected = {
        0: [-0.625542, 0.9096196, -0.3605895, 0.4054455, -0.2806381, -1.1386153],
        1: [0.8508043, 1.8847003, -0.0260877, -0.5269681, 0.2174669, -1.1180125],
    }
    for seed, values in expected.items():
        assert hashed_normal(seed, (2, 1, 3)).flatten().tolist() == pytest.approx(values, abs=1e-6)


def hashed_element(seed, indices):
    """One element of `hashed_uniform`, in plain integers."""

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
        x = ((x ^ (x >> 15)) * 0x735A2D97) % 2**32
        return x ^ (x >> 15)

    state = (seed + 0x9E3779B9) % 2**32
    for index in indices:
        state = mix(mix(state) + index)
    return ((state >> 9) + 0.5) / 2**23


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**40 + 3])
def test_hashed_uniform_numbers_equal_the_hash_in_plain_integers(seed):
    uniform = hashed_uniform(seed, (2, 3))
    expected = [[hashed_element(seed, (row, column)) for column in range(3)] for row in range(2)]
    assert uniform.tolist() == expected


@pytest.mark.parametrize("seed", [0, 1, 123456789])
def test_hashed_noise_looks_normal(seed):
    noise = hashed_normal(seed, (40, 25, 64)).double()  # 64,000 numbers: standard errors of 0.004 and 0.02
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.015)
    assert (noise**4).mean().item() == pytest.approx(3, abs=0.12)
    assert noise.abs().max() < 6


def test_the_default_seed_has_no_freak_number():
    assert hashed_normal(0, (1, 40, 128)).abs().max() < 5  # about three of a thousand seeds exceed it


def test_hashed_noise_is_uncorrelated_between_neighbours_axes_and_seeds():
    noise = hashed_normal(3, (40, 25, 64)).double()
    others = [hashed_normal(seed, (40, 25, 64)).double() for seed in (4, 2, 3 + 2**16)]
    pairs = [(noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[..., 1:], noise[..., :-1])]
    square = hashed_normal(3, (200, 200)).double()
    for a, b in [*pairs, *[(noise, other) for other in others], (square, square.T.clone().fill_diagonal_(0))]:
        assert (a * b).mean().item() == pytest.approx(0, abs=0.025)


def test_hashed_uniform_numbers_stay_inside_the_open_interval():
    uniform = hashed_uniform(0, (300_000,))
    assert uniform.min() > 0
    assert uniform.max() < 1
    counts = torch.histc(uniform, bins=10, min=0, max=1)
    assert (counts / 30_000 - 1).abs().max() < 0.03


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (2, 5), (0.5, 0.5)])
def test_training_times_follow_the_beta_distribution(alpha, beta):
    times = sample_times(20_000, alpha, beta)
    total = alpha + beta
    assert times.shape == (20_000,)
    assert times.min() >= 0
    assert times.max() <= 1
    assert times.mean().item() == pytest.approx(alpha / total, abs=0.01)
    assert times.var().item() == pytest.approx(alpha * beta / (total**2 * (total + 1)), abs=0.003)


# --- maximum mean discrepancy


def test_mmd_is_small_for_normal_latents_and_large_for_all_others():
    normal = torch.randn(600, 16)
    shifted, collapsed, spread = normal + 1, torch.zeros(600, 16), 3 * normal
    at_normal = gaussian_mmd(normal).item()
    assert 0 <= at_normal < 0.02
    for latents in (shifted, collapsed, spread):
        assert gaussian_mmd(latents).item() > 20 * at_normal


def test_mmd_equals_its_definition():
    latents = torch.randn(5, 3)
    normal = hashed_normal(2, (5, 3))

    def kernel(a, b):
        squared = sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist())) / 3
        return sum(math.exp(-squared / (2 * width**2)) for width in MMD_BANDWIDTHS)

    def mean_kernel(left, right):
        return sum(kernel(a, b) for a in left for b in right) / 25

    expected = mean_kernel(latents, latents) + mean_kernel(normal, normal) - 2 * mean_kernel(latents, normal)
    assert gaussian_mmd(latents, seed=2).item() == pytest.approx(expected, rel=1e-4)


def test_mmd_looks_at_no_more_rows_than_it_is_allowed():
    latents = torch.randn(300, 4)
    first = gaussian_mmd(latents, max_samples=100, seed=0)
    latents[100:] = 1e3
    assert torch.equal(gaussian_mmd(latents, max_samples=100, seed=0), first)
    assert gaussian_mmd(latents, max_samples=100) > 5 * first  # two thirds of a random draw are the far rows


def test_descending_mmd_spreads_a_collapsed_cloud():
    latents = (0.1 * torch.randn(200, 8)).requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        gaussian_mmd(latents).backward()
        optimizer.step()
    assert latents.std() > 0.5


class TestTargetLogProbs:
    """The log-probabilities of targets, which are computed a part at a time."""

    @pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
    def logits(self, request):
        return torch.randn(3, 5, 17, generator=torch.Generator().manual_seed(0)).to(request.param).requires_grad_()

    def targets(self):
        return torch.tensor([[[0, 16, 4, 4]] * 5, [[1, 2, 3, 4]] * 5, [[9, 9, 9, 9]] * 5])  # some stand there twice

    @pytest.mark.parametrize("most", [1, 17, 40, 10_000])
    def test_values_and_gradients_are_those_of_torch(self, logits, most, monkeypatch):
        monkeypatch.setattr(flow_matching_yan, "MOST_LOGITS_CPU", most)
        weights = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
        found, gradients = [], []
        for compute in (target_log_probs, lambda logits, index: logits.float().log_softmax(-1).gather(-1, index)):
            found.append(compute(logits, self.targets()))
            gradients += torch.autograd.grad((found[-1] * weights).sum(), logits)
        torch.testing.assert_close(*found)
        torch.testing.assert_close(*gradients)
        assert found[0].dtype == torch.float32
        assert gradients[0].dtype == logits.dtype

    def test_the_gradient_is_that_of_finite_differences(self):
        logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
        index = torch.tensor([[[0, 1]] * 3, [[4, 4]] * 3])
        assert torch.autograd.gradcheck(lambda x: target_log_probs(x, index), logits, eps=1e-2, atol=1e-3, rtol=1e-3)

    def test_impossible_and_lost_logits(self, logits):
        other = logits.detach().clone()
        other[0, :, 0], other[1, 0, 5] = -torch.inf, torch.nan
        found = target_log_probs(other, self.targets())
        assert (found[0, :, 0] == -torch.inf).all()
        assert found[1, 0].isnan().all()
        assert found[0, :, 1:].isfinite().all()
        assert found[1, 1:].isfinite().all()

    def test_no_copy_of_the_logits_is_kept(self, logits):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            target_log_probs(logits, self.targets())
        assert {x.data_ptr() for x in kept if x.numel() >= logits.numel() and x.is_floating_point()} == {
            logits.data_ptr()
        }

    def test_one_target_for_each_token(self, logits):
        targets = self.targets()[..., 1]
        expected = -F.cross_entropy(logits.float().mT, targets, reduction="none")
        torch.testing.assert_close(token_log_likelihood(logits, targets), expected)

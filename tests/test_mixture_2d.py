"""On a ring of Gaussians eight experts need fewer steps than one: the example, shortened."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "mixture_2d.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("mixture_2d", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mixture_2d"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mixture_2d"]


@pytest.fixture(scope="module")
def results(example):
    return {num_experts: example.train_and_sample(num_experts, 0, 250, 1000, (3, 32)) for num_experts in (1, 8)}


@pytest.fixture(scope="module")
def target(example):
    torch.manual_seed(1)
    return example.sample_target(1000, evenly=True)


@pytest.mark.parametrize("metric", ["sliced_wasserstein", "energy_distance", "share_astray"])
def test_eight_experts_beat_one_at_three_steps(example, results, target, metric):
    distance = {num: getattr(example, metric)(result.samples[3], target) for num, result in results.items()}
    assert distance[8] < 0.8 * distance[1]


def test_the_networks_that_are_compared_are_of_about_the_same_size(results):
    assert results[8].num_parameters == pytest.approx(results[1].num_parameters, rel=0.05)


def test_every_expert_keeps_to_its_own_part_of_the_target(example, results, target):
    centres = torch.stack([target[mode :: example.NUM_MODES].mean(0) for mode in range(example.NUM_MODES)])
    points, experts = results[8].samples[32], results[8].experts
    means = torch.stack([points[experts == expert].mean(0) for expert in range(8)])
    within = (points - means[experts]).square().sum(-1).mean()
    assert within < 0.25 * (points - points.mean(0)).square().sum(-1).mean()
    assert len(torch.cdist(means, centres).argmin(-1).unique()) >= 6
    assert experts.bincount(minlength=8).min() > 0.04 * len(experts)  # an equal share is 0.125


def test_the_metrics_of_known_distances(example):
    points = torch.randn(1000, 2)
    shifted = points + torch.tensor([3.0, 4.0])
    assert example.sliced_wasserstein(points, points) == 0
    # a shift of 5 is seen as 5 |cos| from each direction, whose mean square is 25 / 2
    assert example.sliced_wasserstein(points, shifted) == pytest.approx(5 / 2**0.5, rel=1e-3)
    assert example.energy_distance(points, points) == pytest.approx(0, abs=1e-3)
    assert example.energy_distance(torch.zeros(10, 2), torch.zeros(10, 2) + torch.tensor([3.0, 4.0])) == 10
    assert example.share_astray(torch.tensor([[2.0, 0.0], [0.0, -2.4], [0.0, -2.5], [0.0, 0.0]])) == 0.5


def test_the_script_prints_its_table_and_draws_its_figure(example, tmp_path, capsys, drawings):
    figure = tmp_path / "figures" / "mixture.png"
    example.main(["--output", str(figure), "--num_seeds", "1", "--num_updates", "2", "--num_samples", "100"])
    printed = capsys.readouterr().out
    for text in ("K = 1: ", "K = 8: ", "sliced 2-Wasserstein distance", "energy distance", "belong to no Gaussian"):
        assert text in printed
    shares, perfect = drawings["mixture.png"][-1][:2], drawings["mixture.png"][-1][-1]
    assert [len(line) for line in shares] == [len(example.STEPS)] * 2
    assert all(0 <= share <= 1 for line in [*shares, perfect] for share in line)

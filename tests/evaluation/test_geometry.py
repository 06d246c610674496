"""Geometry of sets whose answer is known."""

import math

import pytest
import torch

from modeling_yan.evaluation import geometry


def test_the_mean_cosine_of_known_directions():
    assert geometry.mean_cosine(torch.eye(4)) == pytest.approx(0)
    assert geometry.mean_cosine(torch.tensor([[1.0, 0.0], [5.0, 0.0]])) == pytest.approx(1)
    assert geometry.mean_cosine(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(-1)
    points = torch.randn(50, 8) + 1
    unit = points / points.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    expected = (cosines.sum() - 50) / (50 * 49)
    assert geometry.mean_cosine(points) == pytest.approx(expected.item(), abs=1e-5)


def test_variance_explained_along_known_axes():
    points = torch.tensor([[3.0, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]])
    assert geometry.explained_variance(points).tolist() == pytest.approx([0.9, 1.0, 1.0])
    assert geometry.effective_dimension(points) == pytest.approx(1 / (0.9**2 + 0.1**2))
    assert geometry.effective_dimension(torch.cat([torch.eye(5), -torch.eye(5)])) == pytest.approx(5)


def test_a_gaussian_gains_nothing_from_more_components_and_four_clusters_do():
    one = torch.randn(2000, 3)
    four = torch.randn(2000, 3) * 0.1 + torch.randint(0, 2, (2000, 2)).mul(4).sub(2).float() @ torch.eye(3)[:2]
    flat, clustered = (geometry.mixture_likelihoods(points, (1, 4)) for points in (one, four))
    assert flat[1] == pytest.approx(-0.5 * math.log(2 * math.pi * math.e), abs=0.05)
    assert abs(flat[4] - flat[1]) < 0.05
    assert clustered[4] - clustered[1] > 0.5


def test_the_mixtures_are_the_same_for_the_same_seed():
    points = torch.randn(200, 4)
    assert geometry.mixture_likelihoods(points, (2,), seed=3) == geometry.mixture_likelihoods(points, (2,), seed=3)


def test_experts_of_classes():
    experts, classes = [0, 0, 1, 1, 1, 0], ["a", "a", "b", "b", "b", "b"]
    assert geometry.usage_by_class(experts, classes, 3) == {"a": [1.0, 0.0, 0.0], "b": [0.25, 0.75, 0.0]}
    assert geometry.usage_information([0, 1] * 4, ["a"] * 4 + ["b"] * 4, 2) == pytest.approx(0)
    assert geometry.usage_information([0, 0, 1, 1], ["a", "a", "b", "b"], 2) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: geometry.mean_cosine(torch.zeros(3)), r"shape \(3,\)"),
        (lambda: geometry.explained_variance(torch.ones(3, 2)), "all equal"),
        (lambda: geometry.mixture_likelihoods(torch.randn(10, 2), (8,)), "must be at least 32"),
        (lambda: geometry.mixture_likelihoods(torch.randn(10, 2), (0,)), "at least 1"),
        (lambda: geometry.usage_by_class([0, 1], ["a"], 2), "equally many"),
        (lambda: geometry.usage_by_class([2], ["a"], 2), "must be 0 to 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

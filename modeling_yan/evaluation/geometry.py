"""The shape of a set of latents, and which expert moves which token.

N: latents or tokens; D: their dimension; K: experts. Sums are taken in float64.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

MIN_VARIANCE = 1e-6  # of a component's dimension, or a repeated point would have an infinite likelihood


def mean_cosine(latents: torch.Tensor) -> float:
    """Mean cosine between different rows of latents (N, D): 0 for directions without preference, 1 for a single one.

    Raises:
        ValueError: Not two-dimensional, or fewer than two rows.
    """
    unit = torch.nn.functional.normalize(_checked(latents), dim=-1)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (len(unit) * (len(unit) - 1)))


def explained_variance(latents: torch.Tensor) -> torch.Tensor:
    """Share of the variance of latents (N, D) along the first 1, 2, ..., D principal components, (D,).

    Raises:
        ValueError: Not two-dimensional, fewer than two rows, or rows that are all equal.
    """
    variances = _component_variances(_checked(latents))
    return variances.cumsum(0) / variances.sum()


def effective_dimension(latents: torch.Tensor) -> float:
    """Participation ratio of the principal variances: 1 on a line, D where all directions vary alike."""
    variances = _component_variances(_checked(latents))
    return float(variances.sum() ** 2 / variances.square().sum())


def mixture_likelihoods(
    latents: torch.Tensor,
    component_counts: Sequence[int] = (1, 2, 4, 8, 16),
    num_dimensions: int = 16,
    num_iterations: int = 50,
    seed: int = 0,
) -> dict[int, float]:
    """How multimodal latents (N, D) are: held-out log-likelihood of Gaussian mixtures, nats per row and dimension.

    The latents are put on their first principal components, each scaled to variance 1, and cut into two random halves;
    mixtures with diagonal covariances are fitted to one half by expectation-maximisation and measured on the other.
    What more components add over one is what no single Gaussian can say.

    Raises:
        ValueError: Fewer than four rows for each component, or a number below 1.
    """
    latents = _checked(latents)
    if min(component_counts) < 1 or num_dimensions < 1 or num_iterations < 1:
        raise ValueError(f"{component_counts=}, {num_dimensions=}, {num_iterations=}: must all be at least 1")
    if len(latents) < 4 * max(component_counts):
        fewest, most = 4 * max(component_counts), max(component_counts)
        raise ValueError(f"{len(latents)} latents: must be at least {fewest} for {most} components")
    generator = torch.Generator().manual_seed(seed)
    points = _whitened(latents, num_dimensions)
    fitted, held_out = points[torch.randperm(len(points), generator=generator)].tensor_split(2)
    return {
        count: float(_log_density(held_out, *_fit(fitted, count, num_iterations, generator)).mean() / points.shape[1])
        for count in component_counts
    }


def usage_by_class(experts: Sequence[int], classes: Sequence[str], num_experts: int) -> dict[str, list[float]]:
    """For each class of tokens the share (K,) that each expert moves. `experts`, `classes`: (N,).

    Raises:
        ValueError: Lengths that differ, no tokens, or an expert that is not 0 to `num_experts` - 1.
    """
    experts, classes = _checked_usage(experts, classes, num_experts)
    shares = {}
    for name in sorted(set(classes.tolist())):
        counts = np.bincount(experts[classes == name], minlength=num_experts)
        shares[name] = (counts / counts.sum()).tolist()
    return shares


def usage_information(experts: Sequence[int], classes: Sequence[str], num_experts: int) -> float:
    """Mutual information between a token's class and its expert, in nats: 0 where the class says nothing of it."""
    experts, classes = _checked_usage(experts, classes, num_experts)
    overall = np.bincount(experts, minlength=num_experts) / len(experts)
    total = 0.0
    for name, shares in usage_by_class(experts, classes, num_experts).items():
        shares, weight = np.array(shares), np.mean(classes == name)
        used = shares > 0
        total += weight * float((shares[used] * np.log(shares[used] / overall[used])).sum())
    return total


def _component_variances(latents):
    """Variances (D,) along the principal components, largest first."""
    centred = latents - latents.mean(0)
    variances = torch.linalg.eigvalsh(centred.T @ centred / len(latents)).flip(0).clamp(min=0)
    if variances.sum() == 0:
        raise ValueError("the latents are all equal: must vary")
    return variances


def _whitened(latents, num_dimensions):
    """Coordinates (N, d) on the first principal components that vary, each with variance 1."""
    centred = latents - latents.mean(0)
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(latents))
    variances, axes = variances.flip(0)[:num_dimensions], axes.flip(1)[:, :num_dimensions]
    varies = variances > MIN_VARIANCE * variances[0]
    return centred @ axes[:, varies] / variances[varies].sqrt()


def _fit(points, num_components, num_iterations, generator):
    """Log weights (K,), means and variances (K, d) of a mixture, from random points and the overall variances."""
    means = points[torch.randperm(len(points), generator=generator)[:num_components]].clone()
    variances = points.var(0, correction=0).expand_as(means).clone()
    log_weights = torch.full((num_components,), -math.log(num_components), dtype=points.dtype)
    for _ in range(num_iterations):
        shares = _log_joint(points, log_weights, means, variances).softmax(-1)
        totals = shares.sum(0).clamp(min=1e-9)
        log_weights = (totals / totals.sum()).log()
        means = shares.T @ points / totals[:, None]
        variances = (shares.T @ points.square() / totals[:, None] - means.square()).clamp(min=MIN_VARIANCE)
        variances = variances + 1e-3  # of variance 1: a component on a few points must not win by being narrow
    return log_weights, means, variances


def _log_joint(points, log_weights, means, variances):
    """log weight + log density (N, K) of every point under every component."""
    distances = (points[:, None] - means).square() / variances + variances.log() + math.log(2 * math.pi)
    return log_weights - 0.5 * distances.sum(-1)


def _log_density(points, *mixture):
    return _log_joint(points, *mixture).logsumexp(-1)


def _checked(latents):
    if latents.dim() != 2 or len(latents) < 2:
        raise ValueError(f"latents of shape {tuple(latents.shape)}: must be (N, D), N at least 2")
    return latents.double()


def _checked_usage(experts, classes, num_experts):
    experts, classes = np.asarray(experts), np.asarray(classes)
    if len(experts) != len(classes) or not len(experts):
        raise ValueError(f"{len(experts)} experts and {len(classes)} classes: must be equally many, at least one")
    if experts.min() < 0 or experts.max() >= num_experts:
        raise ValueError(f"experts from {experts.min()} to {experts.max()}: must be 0 to {num_experts - 1}")
    return experts, classes

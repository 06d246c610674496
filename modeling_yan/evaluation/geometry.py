"""The shape of a set of latents, and which expert moves which token.

N: latents or tokens; D: their dimension; K: experts. Sums are taken in float64.
"""

import warnings
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Labels = Sequence[int] | Sequence[str] | npt.NDArray[Any]
MIN_VARIANCE = 1e-6  # of the largest one's: components with less are left out
SMALLEST_SPREAD = 1e-3  # added to variances of 1: a component on a few points must not win by being narrow


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

    The latents are put on their first principal components, each scaled to variance 1, and cut into two random halves.
    scikit-learn's mixtures with diagonal covariances start from random rows of one half, and the other measures them.
    What more components add over one is what no single Gaussian can say.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: Fewer than four rows for each component, or a number below 1.
    """
    latents = _checked(latents)
    if min(component_counts) < 1 or num_dimensions < 1 or num_iterations < 1:
        raise ValueError(f"{component_counts=}, {num_dimensions=}, {num_iterations=}: must all be at least 1")
    if len(latents) < 4 * max(component_counts):
        fewest, most = 4 * max(component_counts), max(component_counts)
        raise ValueError(f"{len(latents)} latents: must be at least {fewest} for {most} components")
    points = np.random.default_rng(seed).permutation(_whitened(latents, num_dimensions))
    fitted, held_out = np.array_split(points, 2)
    scores = {}
    for count in component_counts:
        mixture = import_sklearn("mixture").GaussianMixture(
            count,
            covariance_type="diag",
            init_params="random_from_data",
            reg_covar=SMALLEST_SPREAD,
            max_iter=num_iterations,
            random_state=seed,
        )
        with warnings.catch_warnings():  # the iterations may end before the fit does
            warnings.simplefilter("ignore", import_sklearn("exceptions").ConvergenceWarning)
            mixture.fit(fitted)
        scores[count] = float(mixture.score(held_out)) / points.shape[1]
    return scores


def usage_by_class(experts: Labels, classes: Labels, num_experts: int) -> dict[str, list[float]]:
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


def usage_information(experts: Labels, classes: Labels, num_experts: int) -> float:
    """Mutual information between a token's class and its expert, in nats: 0 where the class says nothing of it.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: As for `usage_by_class`.
    """
    experts, classes = _checked_usage(experts, classes, num_experts)
    return float(import_sklearn("metrics").mutual_info_score(classes, experts))


def import_sklearn(name: str) -> ModuleType:
    """A module of scikit-learn; raises ImportError, saying what to install, where it is missing."""
    try:
        return import_module(f"sklearn.{name}")
    except ImportError as error:
        raise ImportError("mixtures and mutual information need scikit-learn: pip install scikit-learn") from error


def _component_variances(latents: torch.Tensor) -> torch.Tensor:
    """Variances (D,) along the principal components, largest first."""
    centred = latents - latents.mean(0)
    variances: torch.Tensor = torch.linalg.eigvalsh(centred.T @ centred / len(latents)).flip(0).clamp(min=0)
    if variances.sum() == 0:
        raise ValueError("the latents are all equal: must vary")
    return variances


def _whitened(latents: torch.Tensor, num_dimensions: int) -> npt.NDArray[np.float64]:
    """Coordinates (N, d) on the first principal components that vary, each with variance 1."""
    components = import_sklearn("decomposition").PCA(min(num_dimensions, *latents.shape), svd_solver="full")
    coordinates: npt.NDArray[np.float64] = components.fit_transform(latents.numpy(force=True))
    varies = components.explained_variance_ > MIN_VARIANCE * components.explained_variance_[0]
    return coordinates[:, varies] / coordinates[:, varies].std(0)


def _checked(latents: torch.Tensor) -> torch.Tensor:
    if latents.dim() != 2 or len(latents) < 2:
        raise ValueError(f"latents of shape {tuple(latents.shape)}: must be (N, D), N at least 2")
    return latents.double()


def _checked_usage(experts: Labels, classes: Labels, num_experts: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    experts, classes = np.asarray(experts), np.asarray(classes)
    if len(experts) != len(classes) or not len(experts):
        raise ValueError(f"{len(experts)} experts and {len(classes)} classes: must be equally many, at least one")
    if experts.min() < 0 or experts.max() >= num_experts:
        raise ValueError(f"experts from {experts.min()} to {experts.max()}: must be 0 to {num_experts - 1}")
    return experts, classes

"""How many dimensions a latent space uses: information by channel, active units, effective rank."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from latentae.models.latent_statistics import LatentStatistics

__all__ = [
    "ACTIVE_VARIANCE",
    "active_units",
    "effective_rank",
    "kl_by_channel",
    "merged_scatter",
    "scatter_of",
]

ACTIVE_VARIANCE = 0.01
"""What the posterior mean of an active unit varies by over the data, at least (Burda et al. 2016)."""


def kl_by_channel(mean: Tensor, logvar: Tensor) -> np.ndarray:
    """KL(q || N(0, I)) = 1/2 sum(mean^2 + sigma^2 - 1 - log sigma^2) in nats, summed over the places of each channel.

    Source: Kingma & Welling 2013, appendix B.

    Args:
        mean: [z, h, w] of one latent.
        logvar: the same.

    Returns:
        fp64 [z].
    """
    m, log = (value.double().cpu().numpy().reshape(len(value), -1) for value in (mean, logvar))
    return 0.5 * (np.square(m) + np.exp(log) - 1.0 - log).sum(axis=1)


def scatter_of(mean: Tensor) -> np.ndarray:
    """Sum over the places of one latent [z, h, w] of (m - mean of m)(m - mean of m)^T, m the channels at a place: fp64 [z, z]."""
    values = mean.double().cpu().numpy().reshape(len(mean), -1)
    centered = values - values.mean(axis=1, keepdims=True)
    return centered @ centered.T


def merged_scatter(
    a: LatentStatistics, of_a: np.ndarray, b: LatentStatistics, of_b: np.ndarray
) -> np.ndarray:
    """The scatter of two sets of places together (Chan et al. 1979, eq. 2.1, for vectors): fp64 [z, z].

    Args:
        a: count and mean of the first set.
        of_a: its scatter, fp64 [z, z].
        b: count and mean of the second set.
        of_b: its scatter.
    """
    delta = b.mean - a.mean
    return of_a + of_b + np.outer(delta, delta) * (a.count * (b.count / (a.count + b.count)))


def active_units(variance: np.ndarray) -> int:
    """How many channels say something of the image: those whose posterior mean varies by more than 0.01.

    Source: A_u = Cov_x(E[u | x]) > 0.01, Burda et al. 2016, "Importance weighted autoencoders", sec. 5.2. A unit here is a channel, and
    its variance one over images and places together.

    Args:
        variance: [z], of the posterior mean over the data.
    """
    return int((variance > ACTIVE_VARIANCE).sum())


def effective_rank(covariance: np.ndarray) -> float | None:
    """How many directions the channels vary in: exp(- sum p log p), p the eigenvalues of the covariance divided by their sum.

    From 1, all channels the same but for scale, to z, channels of equal variance without correlation. Source: Roy & Vetterli 2007,
    "The effective rank: a measure of effective dimensionality", with the eigenvalues of the covariance for the singular values.

    Args:
        covariance: [z, z] of the channels of posterior means, or a multiple of it.

    Returns:
        None where nothing varies.
    """
    eigenvalues = np.linalg.eigvalsh(covariance).clip(min=0.0)
    total = eigenvalues.sum()
    if not total > 0:
        return None
    shares = eigenvalues[eigenvalues > 0] / total
    shares = shares[shares > 0]  # of a subnormal eigenvalue nothing may be left
    return float(np.exp(-(shares * np.log(shares)).sum()))

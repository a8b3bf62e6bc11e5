"""A normal distribution of whole latents, to draw from where the model has no prior of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentae.errors import DataError, ImageError
from latentae.tasks.normality import GaussianFit, Moments

__all__ = ["FULL_NUMBERS", "LatentGaussian", "fit_latent_gaussian"]

FULL_NUMBERS = 2048
"""Numbers of a latent up to which their whole covariance is fitted: 34 MB, and seconds to draw from."""


@dataclass(frozen=True)
class LatentGaussian:
    """Mean of each number of a latent, and how they vary together.

    Attributes:
        shape: z, h, w.
        mean: fp64 [z, h, w].
        root: fp64 R with R R^T the covariance: [zhw, zhw], or [z, z], which holds for the deviations from `mean` at every place, places
            then being independent.
        latents: how many it was fitted on.
    """

    shape: tuple[int, int, int]
    mean: Tensor
    root: Tensor
    latents: int

    @property
    def whole(self) -> bool:
        """Whether places vary together, as they do in images."""
        return len(self.root) == self.mean.numel()

    def color(self, noise: Tensor) -> Tensor:
        """Standard normal noise [B, z, h, w] -> mean + R noise, fp32 [B, z, h, w], which is distributed like the latents."""
        noise = noise.double()
        if self.whole:
            return (self.mean + (noise.flatten(1) @ self.root.T).view_as(noise)).float()
        return (self.mean + torch.einsum("ij,bjhw->bihw", self.root, noise)).float()


def fit_latent_gaussian(posteriors: Iterable[tuple[Tensor, Tensor]]) -> LatentGaussian:
    """Fit to sampled latents without drawing any: Cov[z] = Cov[mean] + E[sigma^2] (law of total variance).

    Args:
        posteriors: mean and variance of batches, each [B, z, h, w], all of one size. They are read once.

    Raises:
        DataError: fewer than two latents.
        ImageError: latents of different sizes.
    """
    fit: GaussianFit | None = None
    places: GaussianFit | None = None
    total, spread, shape, count = torch.zeros(()), torch.zeros(()), (0, 0, 0), 0
    for mean, variance in posteriors:
        mean, variance = mean.double().cpu(), variance.double().cpu()
        if places is None:
            z, h, w = mean.shape[1:]
            shape, places = (z, h, w), GaussianFit(z)
            fit = GaussianFit(z * h * w) if z * h * w <= FULL_NUMBERS else None
            total, spread = torch.zeros_like(mean[0]), torch.zeros_like(mean[0])
        if tuple(mean.shape[1:]) != shape:
            found = " x ".join(map(str, mean.shape[1:]))
            raise ImageError(
                f"found a latent of {found} after {' x '.join(map(str, shape))}; give images of one size, or a resolution"
            )
        total, spread, count = total + mean.sum(dim=0), spread + variance.sum(dim=0), count + len(mean)
        if fit is not None:
            fit.add(mean.flatten(1))
        else:
            places.add(mean.transpose(0, 1).flatten(1).T)
    if places is None or count < 2:
        raise DataError(f"found {count} latents, expected 2 or more to fit a Gaussian to; give more images")
    mean, noise = total / count, spread / count
    if fit is not None:
        return LatentGaussian(shape, mean, _root(fit.moments().covariance + noise.flatten().diag()), count)
    return LatentGaussian(
        shape, mean, _root(_within(places.moments(), mean) + noise.mean(dim=(1, 2)).diag()), count
    )


def _within(moments: Moments, mean: Tensor) -> Tensor:
    """Covariance of channels without what the mean itself varies from place to place."""
    vectors = mean.flatten(1) - moments.mean[:, None]
    return moments.covariance - vectors @ vectors.T / vectors.shape[1]


def _root(covariance: Tensor) -> Tensor:
    """Symmetric square root, which also a singular covariance has (fewer latents than numbers in one)."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T

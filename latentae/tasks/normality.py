"""Scores of how much an image differs from normal images, for an autoencoder.

error        Q: mean square of image - reconstruction over elements, images in [-1, 1]
peak         largest value of the blurred error map (mean over channels)
latent       T^2 / z: mean over positions of (v - m)^T S^-1 (v - m) / z, where v is the
             latent vector at a position (Hotelling's T^2)
perceptual   distance of a perceptual network between image and reconstruction

Q and T^2 are the two distances of Jackson & Mudholkar 1979, "Control procedures for residuals
associated with principal component analysis": to the subspace of normal data, and to its center
within that subspace. Their sum, each in units of its mean over normal images, is the combined index
of Yue & Qin 2001, "Reconstruction-based fault identification using a combined index", eq. 12.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentae.errors import DataError
from latentae.models.corruptions import blur
from latentae.models.latent_statistics import Moments

__all__ = ["Gaussian", "auroc", "conformal_threshold", "error_map"]

SHRINKAGE = 1e-3  # minimum, so that a channel that never varies has a finite distance
BLUR = 1 / 128  # sigma as a share of the short side: compression leaves single pixels wrong anywhere


@dataclass(frozen=True)
class Gaussian:
    """Distribution of the latent vectors of normal images.

    Attributes:
        mean: fp64 [z].
        precision: inverse of the covariance, fp64 [z, z].
    """

    mean: Tensor
    precision: Tensor

    @classmethod
    def of(cls, moments: Moments) -> Gaussian:
        """From moments, with a covariance shrunk to the identity (Ledoit & Wolf 2004, eq. 1).

        With n vectors of d numbers the shrinkage is d / (n + d), as if d more vectors had been seen
        that vary evenly.

        Raises:
            DataError: all vectors are equal.
        """
        size = len(moments.mean)
        mean, covariance = torch.from_numpy(moments.mean), torch.from_numpy(moments.m2 / moments.count)
        share = max(size / (moments.count + size), SHRINKAGE)
        scale = float(covariance.diagonal().mean())
        if scale <= 0:
            raise DataError(
                "the latents of the normal images do not vary; the model has collapsed, "
                "or all images are the same"
            )
        identity = torch.eye(size, dtype=torch.float64)
        return cls(mean, torch.linalg.inv((1 - share) * covariance + share * scale * identity))

    def distance(self, latents: Tensor) -> Tensor:
        """Squared Mahalanobis distance / z, mean over positions: [B, z, h, w] -> fp64 [B].

        It is 1 on average for normal images.
        """
        vectors = latents.double().cpu().flatten(2).transpose(1, 2) - self.mean
        return ((vectors @ self.precision) * vectors).sum(dim=2).mean(dim=1) / len(self.mean)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"mean": self.mean.tolist(), "precision": self.precision.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Gaussian:
        """From the values of `to_json`."""
        return cls(*(torch.tensor(value[name], dtype=torch.float64) for name in ("mean", "precision")))


def error_map(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Squared error, mean over channels, blurred: two [B, C, H, W] -> [B, H, W]."""
    squares = (images - reconstructions).square().mean(dim=1, keepdim=True)
    sigma = torch.full((len(squares),), BLUR * min(squares.shape[2:]))
    return blur(squares, sigma)[:, 0]


def conformal_threshold(scores: Tensor, quantile: float) -> float:
    """The ceil((n + 1) q)-th smallest of n scores of normal images.

    Another normal image is at or below it with probability q or more, for any distribution (split
    conformal prediction: Vovk, Gammerman & Shafer 2005; Lei et al. 2018, eq. 2).

    Raises:
        DataError: too few scores for this quantile.
    """
    n = len(scores)
    rank = math.ceil((n + 1) * quantile - 1e-9)
    if rank > n:
        needed = math.ceil(quantile / (1 - quantile) - 1e-9)
        raise DataError(
            f"found {n} normal images to calibrate on, expected {needed} or more for quantile {quantile:g}; "
            "give more images, or a lower quantile"
        )
    return float(scores.sort().values[max(rank, 1) - 1])


def auroc(scores: Tensor, positive: Tensor) -> float | None:
    """Area under the ROC curve; equal scores count half (Mann & Whitney 1947).

    Args:
        scores: [N].
        positive: bool [N].

    Returns:
        0 to 1; None without a positive or without a negative.
    """
    positives, negatives = scores[positive].double(), scores[~positive].double().sort().values
    if not len(positives) or not len(negatives):
        return None
    below = torch.searchsorted(negatives, positives, right=False)
    upto = torch.searchsorted(negatives, positives, right=True)
    return float((below + upto).double().mean() / 2 / len(negatives))

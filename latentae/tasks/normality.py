"""What normal images look like to an autoencoder, and how far an image is from that.

error        Q: mean square of image - reconstruction over elements, images in [-1, 1]; what no latent can say
peak         largest value of the error's map, the mean over channels, blurred
latent       T^2 / z: mean over places of (v - m)^T S^-1 (v - m) / z, v the latent vector of a place (Hotelling's T^2); what the latent
             says, but says of no normal image
perceptual   distance of a perceptual network between image and reconstruction

Q and T^2 are the two distances of Jackson & Mudholkar 1979, "Control procedures for residuals associated with principal component
analysis", to the space that normal data fill and to its middle within that space. Their sum, each in units of its normal size, is the
combined index of Yue & Qin 2001, "Reconstruction-based fault identification using a combined index", eq. 12; here the unit is the mean
over normal images.
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

__all__ = ["Gaussian", "GaussianFit", "Moments", "auroc", "conformal_threshold", "error_map"]

SHRINKAGE = 1e-3  # of the covariance at least, so that a channel that never varies has a finite distance
BLUR = (
    1 / 128
)  # sigma of the error's map in shares of the image's short side: compression leaves single pixels wrong anywhere


class GaussianFit:
    """Mean and covariance of vectors in one pass, in fp64.

    Args:
        size: d.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self._origin: Tensor | None = None  # the first mean, so that subtracting squares loses no digits
        self._sum, self._products = (
            torch.zeros(size, dtype=torch.float64),
            torch.zeros(size, size, dtype=torch.float64),
        )

    def add(self, vectors: Tensor) -> None:
        """Take in [N, d] vectors."""
        vectors = vectors.double().cpu()
        self._origin = vectors.mean(dim=0) if self._origin is None else self._origin
        centered = vectors - self._origin
        self._sum += centered.sum(dim=0)
        self._products += centered.T @ centered
        self.count += len(vectors)

    def moments(self) -> Moments:
        """Mean [d] and covariance [d, d] (divided by N) of all vectors.

        Raises:
            DataError: fewer than two vectors.
        """
        if self._origin is None or self.count < 2:
            raise DataError(
                f"found {self.count} vectors, expected 2 or more to fit a Gaussian to; give more images"
            )
        mean = self._sum / self.count
        return Moments(self._origin + mean, self._products / self.count - torch.outer(mean, mean), self.count)


@dataclass(frozen=True)
class Moments:
    """Mean, fp64 [d], and covariance, fp64 [d, d], of so many vectors."""

    mean: Tensor
    covariance: Tensor
    count: int


@dataclass(frozen=True)
class Gaussian:
    """What latent vectors of normal images are like at any place.

    Attributes:
        mean: fp64 [z].
        precision: inverse of the covariance, fp64 [z, z].
    """

    mean: Tensor
    precision: Tensor

    @classmethod
    def of(cls, moments: Moments) -> Gaussian:
        """From mean and covariance, which is shrunk towards a multiple of the identity (Ledoit & Wolf 2004, eq. 1).

        With n vectors of d numbers the share is d / (n + d): as if d more vectors had been seen that vary evenly.

        Raises:
            DataError: the vectors are all the same.
        """
        size = len(moments.mean)
        share = max(size / (moments.count + size), SHRINKAGE)
        scale = float(moments.covariance.diagonal().mean())
        identity = torch.eye(size, dtype=torch.float64)
        if scale <= 0:
            raise DataError(
                "the latents of the normal images do not vary; the model has collapsed, or all images are one"
            )
        return cls(
            moments.mean, torch.linalg.inv((1 - share) * moments.covariance + share * scale * identity)
        )

    def distance(self, latents: Tensor) -> Tensor:
        """Squared Mahalanobis distance over z, mean over places: [B, z, h, w] -> fp64 [B]; 1 on average for normal ones."""
        vectors = latents.double().cpu().flatten(2).transpose(1, 2) - self.mean
        return ((vectors @ self.precision) * vectors).sum(dim=2).mean(dim=1) / len(self.mean)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"mean": self.mean.tolist(), "precision": self.precision.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Gaussian:
        """What `to_json` gave."""
        return cls(*(torch.tensor(value[name], dtype=torch.float64) for name in ("mean", "precision")))


def error_map(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Squared error, mean over channels, blurred by a Gaussian of 1/128 of the short side: two [B, C, H, W] -> [B, H, W]."""
    squares = (images - reconstructions).square().mean(dim=1, keepdim=True)
    sigma = torch.full((len(squares),), BLUR * min(squares.shape[2:]))
    return blur(squares, sigma)[:, 0]


def conformal_threshold(scores: Tensor, quantile: float) -> float:
    """The ceil((n + 1) q)-th smallest of n scores of normal images.

    A further normal image stays at or below it with probability q or more, whatever the distribution (split conformal prediction:
    Vovk, Gammerman & Shafer 2005; Lei et al. 2018, eq. 2).

    Raises:
        DataError: too few scores for that quantile.
    """
    n = len(scores)
    rank = math.ceil((n + 1) * quantile - 1e-9)
    if rank > n:
        needed = math.ceil(quantile / (1 - quantile) - 1e-9)
        raise DataError(
            f"found {n} normal images to calibrate on, expected {needed} or more for a quantile of {quantile:g}; give more, or a lower one"
        )
    return float(scores.sort().values[max(rank, 1) - 1])


def auroc(scores: Tensor, positive: Tensor) -> float | None:
    """Area under the ROC curve: the chance that a positive scores higher than a negative, ties half (Mann & Whitney 1947).

    Args:
        scores: [N].
        positive: bool [N].

    Returns:
        0 to 1; None where one kind is missing.
    """
    positives, negatives = scores[positive].double(), scores[~positive].double().sort().values
    if not len(positives) or not len(negatives):
        return None
    below = torch.searchsorted(negatives, positives, right=False)
    upto = torch.searchsorted(negatives, positives, right=True)
    return float((below + upto).double().mean() / 2 / len(negatives))

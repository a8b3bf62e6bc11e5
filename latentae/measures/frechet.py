"""Frechet distance of two sets of images, as Gaussians of their features.

    d^2 = |m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))

Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local Nash
equilibrium", sec. 3, after Dowson & Landau 1982, eq. 4. As usual, d^2 is reported, and covariances
are divided by n - 1.

**Noise floor.** For two finite samples of one distribution d^2 is about 1 / n, not 0. `noise_floor`
measures it as the distance between two halves of the originals. Generated images below it can't be
told from perfect ones; with as many images as originals they have about half of that bias.
Reconstructions share the sampling noise of their originals and may be far below.

**No interval.** A bootstrap resample contains about 63 % distinct images, so its d^2 is biased
upwards like that of a smaller set. All resamples can exceed d^2 of the sample that they come from.
Compare d^2 at equal numbers of images, and with the floor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from torch import Tensor

from latentae.errors import DataError
from latentae.models.latent_statistics import Moments

__all__ = ["frechet_distance", "half_of", "noise_floor", "split_moments"]


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two sets of 2 or more images; 0 for equal sets.

    There may be fewer images than features.

    With S = R R^T, the trace of (S_a S_b)^(1/2) is the sum of the singular values of R_a^T R_b.
    Unlike a matrix square root, this takes no root of a rounding error if the covariances are
    singular.

    Raises:
        DataError: fewer than two images in a set, or features of different lengths.
    """
    if len(a.mean) != len(b.mean):
        raise DataError(
            f"features have {len(a.mean)} and {len(b.mean)} numbers; compare features of one extractor"
        )
    trace = float(np.trace(_covariance(a)) + np.trace(_covariance(b)))
    product = _root(a).T @ _root(b)
    overlap = float(np.linalg.svd(product, compute_uv=False).sum()) if product.size else 0.0
    return max(float(np.square(a.mean - b.mean).sum()) + trace - 2 * overlap, 0.0)


def _covariance(moments: Moments) -> np.ndarray:
    if moments.count < 2:
        raise DataError(
            f"found features of {moments.count} images, a covariance needs 2 or more; give more images"
        )
    return moments.m2 / (moments.count - 1)


@lru_cache(maxsize=2)  # the originals are compared with every method
def _root(moments: Moments) -> np.ndarray:
    """R with R R^T the covariance, [d, rank]."""
    values, vectors = np.linalg.eigh(_covariance(moments))
    # With fewer images than features, the other eigenvalues are rounding errors
    real = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, real] * np.sqrt(values[real])


def split_moments(keys: Sequence[str], features: Tensor | np.ndarray) -> tuple[Moments, Moments]:
    """Moments of two halves of images, chosen by the hash of the key.

    The halves do not depend on order, batches and processes.

    Args:
        keys: of the N images.
        features: [N, d].

    Raises:
        DataError: the numbers of keys and rows differ, or `Moments.of` refuses the features.
    """
    if len(keys) != len(features):
        raise DataError(
            f"found {len(keys)} keys and features of {len(features)} images; give one key an image"
        )
    second = np.array([half_of(key) for key in keys], dtype=bool)
    values = features.detach().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
    return Moments.of(values[~second]), Moments.of(values[second])


def noise_floor(halves: tuple[Moments, Moments]) -> float | None:
    """Frechet distance of two halves; None if a half has fewer than two images."""
    return frechet_distance(*halves) if min(half.count for half in halves) >= 2 else None


def half_of(key: str) -> int:
    """The half, 0 or 1, that an image belongs to."""
    data = key.encode("utf-8", "backslashreplace")
    return hashlib.blake2b(data, digest_size=1, person=b"half").digest()[0] & 1

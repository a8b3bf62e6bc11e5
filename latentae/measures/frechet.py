"""Frechet distance of two sets of images: how far apart the Gaussians are that have the means and covariances of their features.

    d^2 = |m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))

Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", sec. 3, after Dowson & Landau
1982, eq. 4. The number reported is d^2, as everywhere. Covariances are divided by n - 1.

**The floor.** d^2 of two finite samples of one distribution is above 0, by about 1 / n. `SplitMoments.floor` says how much: the distance
between two halves of the originals. Images made from scratch can't be told from perfect ones below it; as many of them as there are
originals have about half of that bias. Reconstructions share the sampling noise of their originals and may lie far below.

**No interval.** A resample with repetition holds about 63 % different images and is biased upwards, as a smaller set is: all resamples
can lie above d^2 of the very sample they are drawn from. Compare d^2 at equal numbers of images, and with the floor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from latentae.errors import DataError

__all__ = ["Moments", "SplitMoments", "frechet_distance", "half_of"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Number, mean and scatter of feature vectors seen so far, in fp64; of two sets they merge to those of both."""

    n: int
    """Vectors seen."""
    mean: np.ndarray
    """Their mean, [d]."""
    m2: np.ndarray
    """Sum of (v - mean)(v - mean)^T, [d, d]."""

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """The moments of no vector."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, features: Tensor | np.ndarray) -> Moments:
        """The moments of the rows of [N, d].

        Raises:
            DataError: not two-dimensional, or a feature is NaN or infinite.
        """
        values = (
            features.detach().cpu().double().numpy()
            if isinstance(features, Tensor)
            else np.asarray(features, np.float64)
        )
        if values.ndim != 2:
            raise DataError(
                f"features have shape {values.shape}, expected [images, features]; flatten what belongs to one image"
            )
        if not np.isfinite(values).all():
            raise DataError(
                "features are NaN or infinite, so that nothing is near them; use another extractor"
            )
        if not len(values):
            return cls.empty(values.shape[1])
        mean = values.mean(axis=0)
        centered = values - mean
        return cls(len(values), mean, centered.T @ centered)

    @property
    def dim(self) -> int:
        """d."""
        return len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """Divided by n - 1, as the FID of the paper does, [d, d]; DataError for fewer than two vectors."""
        if self.n < 2:
            raise DataError(
                f"found features of {self.n} images, a covariance needs 2 or more; give more images"
            )
        return self.m2 / (self.n - 1)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together (Chan, Golub & LeVeque 1979, eq. 2.1, for vectors).

        Raises:
            DataError: features of different lengths.
        """
        _check_dims(self, other)
        if not self.n or not other.n:
            return self if self.n else other
        n = self.n + other.n
        delta = other.mean - self.mean
        m2 = np.outer(delta, delta * (self.n * (other.n / n)))
        m2 += self.m2
        m2 += other.m2
        return Moments(n, self.mean + delta * (other.n / n), m2)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays that `from_arrays` restores to the last bit."""
        return {"n": np.array(self.n), "mean": self.mean, "m2": self.m2}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Moments:
        """The moments that `to_arrays` gave."""
        return cls(int(arrays["n"]), np.asarray(arrays["mean"]), np.asarray(arrays["m2"]))

    @cached_property
    def root(self) -> np.ndarray:
        """R with R R^T the covariance, [d, r] of its rank r; kept, for the originals are compared with many methods."""
        values, vectors = np.linalg.eigh(self.covariance)
        real = (
            values > max(values[-1], 0.0) * self.dim * np.finfo(np.float64).eps
        )  # fewer images than features: the rest is rounding
        return vectors[:, real] * np.sqrt(values[real])


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians, 0 for equal sets; any number of images from 2 on, also fewer than features.

    The trace of (S_a S_b)^(1/2) is the sum of the singular values of R_a^T R_b with S = R R^T: S_a S_b and (R_a^T R_b)(R_a^T R_b)^T have
    the same eigenvalues but for zeros. So no root is taken of a rounding error, as a matrix square root does where the covariances are
    singular.

    Raises:
        DataError: fewer than two images in a set, or features of different lengths.
    """
    _check_dims(a, b)
    trace = float(np.trace(a.covariance) + np.trace(b.covariance))
    product = a.root.T @ b.root
    overlap = float(np.linalg.svd(product, compute_uv=False).sum()) if product.size else 0.0
    return max(float(np.square(a.mean - b.mean).sum()) + trace - 2 * overlap, 0.0)


@dataclass(frozen=True, eq=False)
class SplitMoments:
    """The moments of the originals in two halves, chosen by the hash of the key: the same halves for every order, batch and process."""

    halves: tuple[Moments, Moments]

    @classmethod
    def empty(cls, dim: int) -> SplitMoments:
        """Of no image."""
        return cls((Moments.empty(dim), Moments.empty(dim)))

    @classmethod
    def of(cls, keys: Sequence[str], features: Tensor | np.ndarray) -> SplitMoments:
        """Of the images called `keys`, whose features are the rows of [N, d].

        Raises:
            DataError: the numbers of keys and rows differ, or what `Moments.of` refuses.
        """
        if len(keys) != len(features):
            raise DataError(
                f"found {len(keys)} keys and features of {len(features)} images; give one key an image"
            )
        rows = [half_of(key) for key in keys]
        first, second = (
            _rows(features, [row for row, half in enumerate(rows) if half == which]) for which in (0, 1)
        )
        return cls((Moments.of(first), Moments.of(second)))

    @property
    def whole(self) -> Moments:
        """The moments of all images."""
        return self.halves[0].merge(self.halves[1])

    def merge(self, other: SplitMoments) -> SplitMoments:
        """Of both sets together."""
        return SplitMoments((self.halves[0].merge(other.halves[0]), self.halves[1].merge(other.halves[1])))

    def floor(self) -> float | None:
        """Frechet distance of the halves: what sampling noise alone gives; None where a half has fewer than two images."""
        return frechet_distance(*self.halves) if min(half.n for half in self.halves) >= 2 else None

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays that `from_arrays` restores to the last bit."""
        return {
            f"half{which}.{name}": array
            for which in (0, 1)
            for name, array in self.halves[which].to_arrays().items()
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> SplitMoments:
        """What `to_arrays` gave."""
        first, second = (
            {name: arrays[f"half{which}.{name}"] for name in ("n", "mean", "m2")} for which in (0, 1)
        )
        return cls((Moments.from_arrays(first), Moments.from_arrays(second)))


def half_of(key: str) -> int:
    """The half, 0 or 1, that the image called `key` belongs to."""
    return (
        hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=1, person=b"half").digest()[0]
        & 1
    )


def _rows(features: Tensor | np.ndarray, rows: list[int]) -> Tensor | np.ndarray:
    return (
        features[torch.tensor(rows, dtype=torch.long)]
        if isinstance(features, Tensor)
        else np.asarray(features)[rows]
    )


def _check_dims(a: Moments, b: Moments) -> None:
    if a.dim != b.dim:
        raise DataError(f"features have {a.dim} and {b.dim} numbers; compare what one extractor gave")

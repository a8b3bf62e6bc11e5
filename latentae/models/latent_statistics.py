"""Per-channel statistics of latents in one pass, exact for any split of the work.

    posterior      q(z | x) = N(mean, sigma^2), stored as mean and logvar = log sigma^2
    of the means   E[mean], Var[mean]
    of the samples z = mean + sigma eps: E[z] = E[mean], Var[z] = Var[mean] + E[sigma^2]

The last line is the law of total variance: no sample is drawn. Two sets of values merge by Chan,
Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample
variances", eq. 2.1. Everything is NumPy in double precision: its sums do not depend on the number
of threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from latentae.errors import DataError

__all__ = ["LatentStatistics", "Moments", "merge"]

Vector = np.ndarray  # [z] float64


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and squared deviations of vectors, merged without loss of precision.

    Attributes:
        count: number of vectors, or the sum of their weights.
        mean: fp64 [d].
        m2: sum of the squared deviations from the mean, fp64 [d], or their scatter matrix, fp64 [d,
            d].
    """

    count: float
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """The moments of no vector."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, vectors: Tensor | np.ndarray) -> Moments:
        """Mean and scatter matrix of the rows of [N, d].

        Raises:
            DataError: the vectors are not two-dimensional, or not finite.
        """
        if isinstance(vectors, Tensor):
            vectors = vectors.detach().cpu().numpy()
        values = np.asarray(vectors, np.float64)
        if values.ndim != 2:
            raise DataError(f"vectors have shape {values.shape}, expected [N, d]; flatten each image")
        if not np.isfinite(values).all():
            raise DataError("vectors have NaN or infinite values; use another model or extractor")
        if not len(values):
            return cls.empty(values.shape[1])
        mean = values.mean(axis=0)
        centered = values - mean
        return cls(len(values), mean, centered.T @ centered)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of vectors (Chan et al. 1979, eq. 2.1)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta, weight = other.mean - self.mean, self.count * (other.count / count)
        if self.m2.ndim == 1:
            m2 = self.m2 + other.m2 + np.square(delta) * weight
        else:
            m2 = np.outer(delta, delta * weight)
            m2 += self.m2  # in place, for features of 2048 numbers
            m2 += other.m2
        return Moments(count, self.mean + delta * (other.count / count), m2)


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics of latents, per channel."""

    samples: int
    """Number of latents."""
    count: int
    """Values in each channel: samples times height times width."""
    mean: Vector
    """Mean of the posterior mean, [z]."""
    m2: Vector
    """Sum of squared distances of the posterior mean from `mean`, [z]."""
    variance_sum: Vector
    """Sum of the posterior variance sigma^2, [z]."""

    @classmethod
    def empty(cls, channels: int) -> LatentStatistics:
        """The statistics of no latent."""
        return cls(0, 0, np.zeros(channels), np.zeros(channels), np.zeros(channels))

    @classmethod
    def of(cls, mean: Tensor, logvar: Tensor) -> LatentStatistics:
        """The statistics of one stored posterior, `mean` and `logvar` [z, h, w]."""
        values = mean.double().cpu().numpy().reshape(mean.shape[0], -1)
        variance = np.exp(logvar.double().cpu().numpy().reshape(mean.shape[0], -1))
        center = values.mean(axis=1)
        m2 = np.square(values - center[:, None]).sum(axis=1)
        return cls(1, values.shape[1], center, m2, variance.sum(axis=1))

    def merge(self, other: LatentStatistics) -> LatentStatistics:
        """The statistics of both sets together (Chan et al. 1979, eq. 2.1)."""
        both = Moments(self.count, self.mean, self.m2).merge(Moments(other.count, other.mean, other.m2))
        variance_sum = self.variance_sum + other.variance_sum
        return LatentStatistics(
            self.samples + other.samples, int(both.count), both.mean, both.m2, variance_sum
        )

    def summary(self) -> dict[str, Any]:
        """The values that a diffusion model needs, as plain JSON.

        `scaling_factor` is 1 / (standard deviation of the sampled latent over all channels),
        Rombach et al. 2022, App. G; `shift_factor` is its mean; `latents_mean` and `latents_std`
        are the same by channel. A diffusion model sees (z - shift) * scaling. All are null where no
        latent was seen, `scaling_factor` also where the latents do not vary.
        """
        if not self.count:
            names = (
                "scaling_factor",
                "shift_factor",
                "latents_mean",
                "latents_std",
                "posterior_mean_std",
                "posterior_std",
            )
            return {"samples": 0, "values_per_channel": 0, **dict.fromkeys(names)}
        noise = self.variance_sum / self.count
        variance = self.m2 / self.count + noise
        shift = float(self.mean.mean())
        # Var over all channels = mean of the channels' variances + variance of the channels' means
        overall = float(np.sqrt(variance.mean() + np.square(self.mean - shift).mean()))
        return {
            "samples": self.samples,
            "values_per_channel": self.count,
            "scaling_factor": 1 / overall if overall > 0 else None,
            "shift_factor": shift,
            "latents_mean": self.mean.tolist(),
            "latents_std": np.sqrt(variance).tolist(),
            "posterior_mean_std": np.sqrt(self.m2 / self.count).tolist(),
            "posterior_std": np.sqrt(noise).tolist(),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values that `from_json` restores to the last bit."""
        vectors = {name: getattr(self, name).tolist() for name in ("mean", "m2", "variance_sum")}
        return {"samples": self.samples, "count": self.count, **vectors}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LatentStatistics:
        """The statistics that `to_json` wrote, else a ValueError, KeyError or TypeError."""
        vectors = [np.asarray(value[name], dtype=np.float64) for name in ("mean", "m2", "variance_sum")]
        if any(
            vector.ndim != 1 or len(vector) != len(vectors[0]) or not np.isfinite(vector).all()
            for vector in vectors
        ):
            raise ValueError("mean, m2 and variance_sum must be finite and of one length")
        return cls(int(value["samples"]), int(value["count"]), *vectors)


def merge(parts: Iterable[LatentStatistics], channels: int) -> LatentStatistics:
    """All `parts` together, merged in the order given (the last bits depend on it: give them
    sorted)."""
    total = LatentStatistics.empty(channels)
    for part in parts:
        total = total.merge(part)
    return total

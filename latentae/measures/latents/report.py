"""Statistics of a latent space: moments by channel, KL, dimensions in use, and spectrum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from latentae.errors import DataError, ImageError, ModelError
from latentae.measures.latents.spectrum import SMALLEST, power_sums, spectrum
from latentae.models.base import DiagonalGaussian
from latentae.models.latent_statistics import LatentStatistics

__all__ = ["ACTIVE_VARIANCE", "LatentReport", "active_units", "effective_rank", "kl_by_channel"]

ACTIVE_VARIANCE = 0.01  # of the posterior mean of an active unit (Burda et al. 2016)
ROUNDING = 1e-14  # variance over squared mean of a constant fp32 number


def kl_by_channel(mean: Tensor, logvar: Tensor) -> np.ndarray:
    """KL(q || N(0, I)) = 1/2 sum(mean^2 + sigma^2 - 1 - log sigma^2) in nats, summed over the
    pixels of each channel.

    Source: Kingma & Welling 2013, appendix B.

    Args:
        mean: [z, h, w] of one latent.
        logvar: the same.

    Returns:
        fp64 [z].
    """
    m, log = (value.double().cpu().numpy().reshape(len(value), -1) for value in (mean, logvar))
    return 0.5 * (np.square(m) + np.exp(log) - 1.0 - log).sum(axis=1)


def active_units(variance: np.ndarray) -> int:
    """Number of channels whose posterior mean varies by more than 0.01 over the data.

    Source: A_u = Cov_x(E[u | x]) > 0.01, Burda et al. 2016, "Importance weighted autoencoders",
    sec. 5.2. Here a unit is a channel, and its variance is over images and pixels.

    Args:
        variance: [z], of the posterior mean over the data.
    """
    return int((variance > ACTIVE_VARIANCE).sum())


def effective_rank(covariance: np.ndarray) -> float | None:
    """Number of directions in which the channels vary: exp(- sum p log p), p the normalized
    eigenvalues of the covariance.

    1 if all channels are equal up to scale, z if they are uncorrelated with equal variance. Source:
    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", with
    eigenvalues of the covariance for singular values.

    Args:
        covariance: [z, z] of the channels of posterior means, up to a factor.

    Returns:
        None if nothing varies.
    """
    eigenvalues = np.linalg.eigvalsh(covariance).clip(min=0.0)
    total = eigenvalues.sum()
    if not total > 0:
        return None
    shares = eigenvalues[eigenvalues > 0] / total
    shares = shares[shares > 0]  # a subnormal eigenvalue may underflow
    return float(np.exp(-(shares * np.log(shares)).sum()))


@dataclass(frozen=True)
class _Sums:
    """Sums over latents of one shape, in fp64.

    Attributes:
        statistics: by channel.
        scatter: [z, z], centered second moments of posterior means over images and pixels.
        std: [z], posterior standard deviations over images and pixels.
        kl: [z], KL in nats over images and pixels.
        largest: magnitude of a posterior mean.
        power: of latents and images, see `power_sums`; None without images, or for latents smaller
            than 4 x 4.
        shape: z, h, w.
    """

    statistics: LatentStatistics
    scatter: np.ndarray
    std: np.ndarray
    kl: np.ndarray
    largest: float
    power: tuple[np.ndarray, np.ndarray] | None
    shape: tuple[int, ...]

    @classmethod
    def of(cls, mean: Tensor, logvar: Tensor, image: Tensor | None) -> _Sums:
        """Sums of one latent [z, h, w] on the CPU and its image [C, H, W]."""
        values = mean.double().numpy().reshape(len(mean), -1)
        centered = values - values.mean(axis=1, keepdims=True)
        return cls(
            LatentStatistics.of(mean, logvar),
            centered @ centered.T,
            np.exp(0.5 * logvar.double().numpy()).sum(axis=(1, 2)),
            kl_by_channel(mean, logvar),
            float(mean.abs().max()),
            None if image is None or min(mean.shape[1:]) < SMALLEST else power_sums(mean, image),
            tuple(mean.shape),
        )

    def merge(self, other: _Sums) -> _Sums:
        """Sums over both sets of latents, this one's first."""
        if self.shape != other.shape or (self.power is None) != (other.power is None):
            raise ImageError(
                f"found latents of {self._described()} and {other._described()}, expected the same of all; "
                "give images of one size"
            )
        a, b = self.statistics, other.statistics
        delta = b.mean - a.mean  # Chan et al. 1979, eq. 2.1, for vectors
        shift = np.outer(delta, delta) * (a.count * (b.count / (a.count + b.count)))
        power = None
        if self.power is not None and other.power is not None:
            power = self.power[0] + other.power[0], self.power[1] + other.power[1]
        return _Sums(
            a.merge(b),
            self.scatter + other.scatter + shift,
            self.std + other.std,
            self.kl + other.kl,
            max(self.largest, other.largest),
            power,
            self.shape,
        )

    def _described(self) -> str:
        return " x ".join(map(str, self.shape)) + (" without spectra" if self.power is None else "")


@dataclass
class LatentReport:
    """Sums over the latents counted so far; memory does not grow with their number.

    Images are counted one by one, so batches do not change the numbers. Reports of parts of the
    data merge. The last bits depend on the division into parts and on their order.
    """

    _sums: _Sums | None = None

    @property
    def statistics(self) -> LatentStatistics | None:
        """Mean and variance by channel; None before the first latent."""
        return None if self._sums is None else self._sums.statistics

    def add(self, posterior: DiagonalGaussian, images: Tensor | None = None) -> None:
        """Count the latents of a batch.

        Args:
            posterior: of latents [B, z, h, w].
            images: the encoded images, float [B, C, H, W] in [-1, 1]; without them there are no
                spectra. Give them always or never.

        Raises:
            ModelError: a latent is not finite.
            ImageError: the latents' shape changes, or the number of images differs from that of
                latents.
        """
        mean, logvar = (values.cpu().contiguous() for values in (posterior.mean, posterior.logvar))
        if images is not None and (images.ndim != 4 or len(images) != len(mean)):
            raise ImageError(
                f"images have shape {tuple(images.shape)}, expected [{len(mean)}, C, H, W] for as many "
                "latents"
            )
        if not (mean.isfinite().all() and logvar.isfinite().all()):
            raise ModelError(
                "the encoder gave latents with NaN or infinite values; the model has diverged, use an "
                "earlier checkpoint"
            )
        for number in range(len(mean)):
            one = _Sums.of(mean[number], logvar[number], None if images is None else images[number])
            self._sums = one if self._sums is None else self._sums.merge(one)

    def merge(self, other: LatentReport) -> LatentReport:
        """The report of both sets of latents, this one's first.

        Raises:
            ImageError: the latents' shapes differ, or only one set has spectra.
        """
        if self._sums is None or other._sums is None:
            return LatentReport(other._sums if self._sums is None else self._sums)
        return LatentReport(self._sums.merge(other._sums))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays that `from_arrays` restores exactly; empty before the first latent."""
        if self._sums is None:
            return {}
        sums = self._sums
        values = {**vars(sums.statistics), "scatter": sums.scatter, "std": sums.std, "kl": sums.kl}
        values |= {"largest": sums.largest, "shape": sums.shape}
        if sums.power is not None:
            values["power_latent"], values["power_image"] = sums.power
        return {name: np.asarray(value) for name, value in values.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> LatentReport:
        """The report that `to_arrays` stored.

        Raises:
            KeyError, TypeError, ValueError: the arrays are damaged.
        """
        if not arrays:
            return cls()
        z, height, width = (int(side) for side in arrays["shape"])
        names = ("mean", "m2", "variance_sum", "std", "kl")
        mean, m2, variance_sum, std, kl = vectors = [
            np.asarray(arrays[name], dtype=np.float64) for name in names
        ]
        if any(vector.shape != (z,) for vector in vectors) or arrays["scatter"].shape != (z, z):
            raise ValueError(f"expected vectors of {z} channels and a square scatter")
        statistics = LatentStatistics(int(arrays["samples"]), int(arrays["count"]), mean, m2, variance_sum)
        power = (arrays["power_latent"], arrays["power_image"]) if "power_latent" in arrays else None
        largest = float(arrays["largest"])
        return cls(_Sums(statistics, arrays["scatter"], std, kl, largest, power, (z, height, width)))

    def result(self) -> dict[str, Any]:
        """Everything as plain JSON values; null where it does not exist (see
        `LatentStatistics.summary` for the scaling).

        `channel_posterior_std` is the mean of the posterior's standard deviation.
        `channel_mean_variance` is the variance of its mean over images and pixels.
        `kl_nats_per_channel` is the mean over images of the KL summed over pixels.

        Raises:
            DataError: no latent was counted.
        """
        if self._sums is None:
            raise DataError(
                "there are no latents to report on: no image was encoded; give shards with images"
            )
        sums, known = self._sums, self._sums.statistics
        summary, variance = known.summary(), known.m2 / known.count
        varies = variance > ROUNDING * np.square(known.mean)
        channel_variance = np.where(varies, variance, 0.0)
        scale, kl = summary["scaling_factor"], sums.kl / known.samples
        return {
            "channel_mean": summary["latents_mean"],
            "channel_std": summary["latents_std"],
            "channel_posterior_std": (sums.std / known.count).tolist(),
            "channel_mean_variance": variance.tolist(),
            "mean": summary["shift_factor"],
            "std": 0.0 if scale is None else 1 / scale,
            "largest_absolute_mean": sums.largest,
            "kl_nats_per_image": float(kl.sum()),
            "kl_nats_per_channel": kl.tolist(),
            "active_units": active_units(variance),
            "effective_rank": effective_rank(sums.scatter / known.count) if varies.any() else None,
            "spectrum": None
            if sums.power is None
            else spectrum(*sums.power, sums.shape[1:], channel_variance),
            "scaling_factor": scale,
            "shift_factor": summary["shift_factor"],
        }

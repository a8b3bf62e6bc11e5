"""What a latent space looks like in numbers: statistics by channel, KL, dimensions in use, spectrum, and the scaling it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from latentae.errors import DataError, ImageError, ModelError
from latentae.measures.latents.dimensions import (
    active_units,
    effective_rank,
    kl_by_channel,
    merged_scatter,
    scatter_of,
)
from latentae.measures.latents.spectrum import SMALLEST, PowerSums
from latentae.models.latent_statistics import LatentStatistics
from latentae.models.posterior import DiagonalGaussian

__all__ = ["LatentReport"]

ROUNDING = 1e-14  # variance over squared mean of an fp32 number that is always the same but for rounding


@dataclass(frozen=True)
class _Sums:
    """Sums over latents of one shape; all arrays fp64."""

    statistics: LatentStatistics
    scatter: np.ndarray
    """[z, z], centered second moments of posterior means over images and places."""
    std: np.ndarray
    """[z], posterior standard deviations over images and places."""
    kl: np.ndarray
    """[z], KL in nats over images and places."""
    largest: float
    """Magnitude of a posterior mean."""
    power: PowerSums | None
    """None where no images were given, or latents are smaller than 4 x 4."""
    shape: tuple[int, ...]
    """z, h, w."""

    @classmethod
    def of(cls, mean: Tensor, logvar: Tensor, image: Tensor | None) -> _Sums:
        """Of one latent [z, h, w] on the CPU and its image [C, H, W]."""
        return cls(
            LatentStatistics.of(mean, logvar),
            scatter_of(mean),
            np.exp(0.5 * logvar.double().numpy()).sum(axis=(1, 2)),
            kl_by_channel(mean, logvar),
            float(mean.abs().max()),
            None if image is None or min(mean.shape[1:]) < SMALLEST else PowerSums.of(mean, image),
            tuple(mean.shape),
        )

    def merge(self, other: _Sums) -> _Sums:
        """Of both sets of latents, this one's first."""
        if self.shape != other.shape or (self.power is None) != (other.power is None):
            raise ImageError(
                f"found latents of {self._described()} and {other._described()}, expected the same of all; give images of one size"
            )
        return _Sums(
            self.statistics.merge(other.statistics),
            merged_scatter(self.statistics, self.scatter, other.statistics, other.scatter),
            self.std + other.std,
            self.kl + other.kl,
            max(self.largest, other.largest),
            None if self.power is None or other.power is None else self.power.merge(other.power),
            self.shape,
        )

    def _described(self) -> str:
        return " x ".join(map(str, self.shape)) + (" without spectra" if self.power is None else "")


@dataclass
class LatentReport:
    """Sums over the latents seen so far, in fp64; memory does not grow with their number.

    Images count one by one, so the numbers don't depend on how they were batched. Reports of parts of the data merge; the last bits
    depend on how it was cut and on the order (additions round), so cut it the same way however many processes there are.
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
            images: float [B, C, H, W] in [-1, 1], what was encoded; without them there are no spectra. Give them always or never.

        Raises:
            ModelError: latents that are not finite.
            ImageError: latents of another shape than before, or another number of images than latents.
        """
        mean, logvar = (values.cpu().contiguous() for values in (posterior.mean, posterior.logvar))
        if images is not None and (images.ndim != 4 or len(images) != len(mean)):
            raise ImageError(
                f"images have shape {tuple(images.shape)}, expected [{len(mean)}, C, H, W] for as many latents"
            )
        if not (mean.isfinite().all() and logvar.isfinite().all()):
            raise ModelError(
                "the encoder gave latents with NaN or infinite values; the model has diverged, take an earlier one"
            )
        for number in range(len(mean)):
            one = _Sums.of(mean[number], logvar[number], None if images is None else images[number])
            self._sums = one if self._sums is None else self._sums.merge(one)

    def merge(self, other: LatentReport) -> LatentReport:
        """The report of both sets of latents, this one's first.

        Raises:
            ImageError: latents of different shapes, or spectra in one of them only.
        """
        if self._sums is None or other._sums is None:
            return LatentReport(other._sums if self._sums is None else self._sums)
        return LatentReport(self._sums.merge(other._sums))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays that `from_arrays` restores to the last bit; none where there was no latent."""
        if self._sums is None:
            return {}
        sums, known = self._sums, self._sums.statistics
        values = {"samples": known.samples, "count": known.count, "mean": known.mean, "m2": known.m2}
        values |= {
            "variance_sum": known.variance_sum,
            "scatter": sums.scatter,
            "std": sums.std,
            "kl": sums.kl,
        }
        values |= {"largest": sums.largest, "shape": sums.shape}
        if sums.power is not None:
            values |= {"power_latent": sums.power.latent, "power_image": sums.power.image}
        return {name: np.asarray(value) for name, value in values.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> LatentReport:
        """The report that `to_arrays` gave; KeyError, TypeError or ValueError if it is none."""
        if not arrays:
            return cls()
        shape = tuple(int(side) for side in arrays["shape"])
        z, height, width = shape
        vectors = {
            name: np.asarray(arrays[name], dtype=np.float64)
            for name in ("mean", "m2", "variance_sum", "std", "kl")
        }
        if any(vector.shape != (z,) for vector in vectors.values()) or arrays["scatter"].shape != (z, z):
            raise ValueError(f"expected vectors of {z} channels and a square scatter")
        statistics = LatentStatistics(
            int(arrays["samples"]),
            int(arrays["count"]),
            vectors["mean"],
            vectors["m2"],
            vectors["variance_sum"],
        )
        power = None
        if "power_latent" in arrays:
            power = PowerSums(arrays["power_latent"], arrays["power_image"], (height, width))
        return cls(
            _Sums(
                statistics,
                arrays["scatter"],
                vectors["std"],
                vectors["kl"],
                float(arrays["largest"]),
                power,
                shape,
            )
        )

    def result(self) -> dict[str, Any]:
        """Everything as plain JSON values; null where it does not exist (see `LatentStatistics.summary` for the scaling).

        `channel_posterior_std` is the mean of the posterior's standard deviation, `channel_mean_variance` the variance of its mean over
        images and places, `kl_nats_per_channel` the mean over images of the KL summed over places; `active_units`, `effective_rank` and
        `spectrum` are those of `dimensions` and `spectrum`.

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
            "spectrum": None if sums.power is None else sums.power.result(np.where(varies, variance, 0.0)),
            "scaling_factor": scale,
            "shift_factor": summary["shift_factor"],
        }

"""The radial spectrum of latents beside that of their images: how much of what a diffusion model must make is fine detail."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.losses.spectrum import dct2

__all__ = ["HIGH", "MOST_BANDS", "SMALLEST", "PowerSums", "radial_bands"]

HIGH = 0.25
"""Cycles per latent pixel above which a frequency counts as high: half of the highest along a side."""
MOST_BANDS = 16
SMALLEST = 4
"""Sides of the smallest latent that has a spectrum."""
NOTHING = 1e-12
"""Power that is rounding: images have values in [-1, 1], and channels are divided by their variance."""


@dataclass(frozen=True)
class PowerSums:
    """Power of latents and of images shrunk to their size, by radial band, summed over images.

    Power is the square of a DCT-II coefficient (orthonormal, so that power adds up to the variance about the mean of the image); the
    constant one, the mean itself, has no part in it.

    Attributes:
        latent: fp64 [z, bands + 2], for each channel of the posterior mean: the mean power of a coefficient in each band, then the
            power of all coefficients above `HIGH`, and of all.
        image: fp64 [bands + 2], the same, over all channels of the image together.
        size: height and width of the latents.
    """

    latent: np.ndarray
    image: np.ndarray
    size: tuple[int, int]

    @classmethod
    def of(cls, latent: Tensor, image: Tensor) -> PowerSums:
        """The sums of one image.

        Args:
            latent: [z, h, w], sides of at least `SMALLEST`.
            image: [C, H, W], sides of at least h and w; averaged over areas until it has h x w pixels.
        """
        size = (latent.shape[1], latent.shape[2])
        small = F.adaptive_avg_pool2d(image.double().contiguous(), size)
        of_image = _sums(small).sum(axis=0)
        return cls(_sums(latent.double()), of_image, size)

    def merge(self, other: PowerSums) -> PowerSums:
        """The sums of both sets of images."""
        return PowerSums(self.latent + other.latent, self.image + other.image, self.size)

    def result(self, variance: np.ndarray) -> dict[str, Any] | None:
        """Both spectra as plain JSON values.

        `frequency` is the mean of each band in cycles per latent pixel (0.5 is the highest along a side, 0.707 that of a corner).
        `latent` and `image` are the mean power of a coefficient in each band, divided by the sum over bands: white noise is flat.
        Channels count alike, each divided by its variance. `high_frequency_share` is the part of all power above `HIGH`.

        Args:
            variance: [z], of the posterior mean over images and places; channels with 0, which do not vary, are left out.

        Returns:
            None where all images, or all latents, are without any detail.
        """
        varies = variance > 0
        latent = (self.latent[varies] / variance[varies, None]).sum(axis=0)
        if latent[-1] < NOTHING or self.image[-1] < NOTHING:
            return None
        rows = {"latent": latent, "image": self.image}
        return {
            "frequency": radial_bands(*self.size)[1].tolist(),
            **{name: (row[:-2] / row[:-2].sum()).tolist() for name, row in rows.items()},
            "high_frequency_share": {name: float(row[-2] / row[-1]) for name, row in rows.items()},
        }


@lru_cache(maxsize=8)
def radial_bands(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which coefficients of a DCT belong to which band.

    Coefficient (ky, kx) has the radius sqrt((ky / 2h)^2 + (kx / 2w)^2) in cycles a pixel. Bands are equally wide from 0 to the highest,
    at most 16 and no more than a side has pixels, so that none is empty.

    Returns:
        Membership [h w, bands] of 0 and 1 (the constant coefficient has none), the mean radius of each band [bands], and whether
        coefficients are above `HIGH` [h w]; all fp64.
    """
    bands = min(MOST_BANDS, height, width)
    radius = np.hypot((np.arange(height) / (2 * height))[:, None], np.arange(width) / (2 * width)).ravel()
    band = np.minimum(
        np.floor(radius / radius.max() * bands + 1e-9), bands - 1
    )  # rounding must not part equal radii
    membership = (band[:, None] == np.arange(bands)).astype(np.float64)
    membership[0] = 0.0
    mean_radius = radius @ membership / membership.sum(axis=0)
    return membership, mean_radius, (radius > HIGH + 1e-9).astype(np.float64)


def _sums(x: Tensor) -> np.ndarray:
    """Of each channel of [C, h, w] the mean power by band, that above `HIGH`, and all: fp64 [C, bands + 2]."""
    power = torch.square(dct2(x)).flatten(1).cpu().numpy()
    power[:, 0] = 0.0
    membership, _, high = radial_bands(*x.shape[1:])
    return np.column_stack([power @ membership / membership.sum(axis=0), power @ high, power.sum(axis=1)])

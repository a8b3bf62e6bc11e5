"""Radial spectrum of latents and of their images: the share of fine detail."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.losses.spectrum import dct2

__all__ = ["MOST_BANDS", "SMALLEST", "power_sums", "radial_bands", "spectrum"]

HIGH = 0.25  # cycles per latent pixel above which a frequency is high: half of the highest along a side
MOST_BANDS = 16
SMALLEST = 4  # side of the smallest latent that has a spectrum
NOTHING = 1e-12  # power of rounding errors: images are in [-1, 1], and channels are divided by their variance


def power_sums(latent: Tensor, image: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Power of a latent and of its image, shrunk to the same size, by radial band.

    Power is the square of a DCT-II coefficient. The DCT is orthonormal, so power adds up to the
    variance about the image's mean. The constant coefficient, the mean itself, is left out.

    Args:
        latent: [z, h, w], a posterior mean with sides of at least `SMALLEST`.
        image: [C, H, W] with H >= h and W >= w; area-averaged to h x w pixels.

    Returns:
        Per latent channel, fp64 [z, bands + 2]: the mean power of a coefficient in each band, then
        the power of all coefficients above `HIGH`, and of all. The same over all channels of the
        image, fp64 [bands + 2].
    """
    _, height, width = latent.shape
    small = F.adaptive_avg_pool2d(image.double().contiguous(), (height, width))
    return _band_power(latent.double()), _band_power(small).sum(axis=0)


def spectrum(
    latent: np.ndarray, image: np.ndarray, size: Sequence[int], variance: np.ndarray
) -> dict[str, Any] | None:
    """Both spectra as plain JSON values.

    `frequency` is the mean of each band in cycles per latent pixel (0.5 is the highest along a
    side, 0.707 that of a corner). `latent` and `image` are the mean power of a coefficient in each
    band, divided by the sum over bands: white noise is flat. Channels are divided by their
    variance, so that they have equal weight. `high_frequency_share` is the share of power above
    `HIGH`.

    Args:
        latent, image: sums of `power_sums` over images.
        size: height and width of the latents.
        variance: [z], of the posterior mean over images and pixels; channels with variance 0 are
            left out.

    Returns:
        None if all images, or all latents, are constant.
    """
    varies = variance > 0
    standardized = (latent[varies] / variance[varies, None]).sum(axis=0)
    if standardized[-1] < NOTHING or image[-1] < NOTHING:
        return None
    rows = {"latent": standardized, "image": image}
    return {
        "frequency": radial_bands(*size)[1].tolist(),
        **{name: (row[:-2] / row[:-2].sum()).tolist() for name, row in rows.items()},
        "high_frequency_share": {name: float(row[-2] / row[-1]) for name, row in rows.items()},
    }


@lru_cache(maxsize=8)
def radial_bands(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Assign the coefficients of a DCT to radial bands.

    Coefficient (ky, kx) has the radius sqrt((ky / 2h)^2 + (kx / 2w)^2) in cycles per pixel. Bands
    have equal widths. There are at most 16, and at most as many as a side has pixels, so that none
    is empty.

    Returns:
        Membership [h w, bands] of 0 and 1 (the constant coefficient has none), the mean radius of
        each band [bands], and whether coefficients are above `HIGH` [h w]; all fp64.
    """
    bands = min(MOST_BANDS, height, width)
    radius = np.hypot((np.arange(height) / (2 * height))[:, None], np.arange(width) / (2 * width)).ravel()
    # The small offset keeps rounding from separating equal radii
    band = np.minimum(np.floor(radius / radius.max() * bands + 1e-9), bands - 1)
    membership = (band[:, None] == np.arange(bands)).astype(np.float64)
    membership[0] = 0.0
    mean_radius = radius @ membership / membership.sum(axis=0)
    return membership, mean_radius, (radius > HIGH + 1e-9).astype(np.float64)


def _band_power(x: Tensor) -> np.ndarray:
    """Power of each channel of [C, h, w]: mean by band, above `HIGH`, and total."""
    power = torch.square(dct2(x)).flatten(1).cpu().numpy()
    power[:, 0] = 0.0
    membership, _, high = radial_bands(*x.shape[1:])
    return np.column_stack([power @ membership / membership.sum(axis=0), power @ high, power.sum(axis=1)])

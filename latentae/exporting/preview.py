"""Preview of a latent without its decoder: the color of a latent pixel as a linear function."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.errors import DataError, ImageError, ModelError
from latentae.exporting.scaling import LatentScaling

__all__ = ["Preview", "PreviewFit"]


@dataclass(frozen=True)
class Preview:
    """RGB = latent @ factors + bias, in about [-1, 1], for latents as a diffusion model sees them.

    These are (z - shift_factor) * scaling_factor. The names are those that user interfaces of
    diffusion models read.
    """

    latent_rgb_factors: list[list[float]]
    """[z][3]: red, green and blue of each channel."""
    latent_rgb_factors_bias: list[float]
    r2: float | None
    """Share of the colors' variance that is explained; None if all images have one color."""
    images: int
    """Number of images of the fit."""
    scaling_factor: float
    shift_factor: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class PreviewFit:
    """Least squares from latents to images shrunk to their size, over batches, in constant memory.

    It keeps the sums of the normal equations (A'A, A'B and B'B, where A is the latents and a column
    of ones) in fp64.

    Args:
        channels: of the latent, z.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.images = 0
        self._moments = np.zeros((channels + 4, channels + 4))  # of (latent, 1, color)

    def add(self, latents: Tensor, images: Tensor) -> None:
        """Add raw latents [B, z, h, w] and their images [B, 3, H, W] in [-1, 1].

        Raises:
            ModelError: another number of latent channels.
            ImageError: not as many RGB images.
            DataError: values that are not finite.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ModelError(
                f"latents have shape {tuple(latents.shape)}, expected [B, {self.channels}, h, w]"
            )
        if images.ndim != 4 or images.shape[:2] != (len(latents), 3):
            raise ImageError(
                f"images have shape {tuple(images.shape)}, expected RGB: [{len(latents)}, 3, H, W]"
            )
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        colors = F.interpolate(wide, size=latents.shape[2:], mode="area").cpu().double()
        ones = torch.ones_like(colors[:, :1])
        rows = torch.cat([latents.cpu().double(), ones, colors], dim=1)
        values = rows.movedim(1, 0).flatten(1).numpy()  # [z + 4, pixels]
        moments = values @ values.T
        if not np.isfinite(moments).all():
            raise DataError("latents or images of a preview are not finite; leave them out")
        self._moments += moments
        self.images += len(images)

    def result(self, scaling: LatentScaling) -> Preview:
        """The fit for normalized latents n, where raw = n * std + mean.

        If channels are linearly dependent, the factors are the smallest that explain as much.

        Raises:
            DataError: no image was added.
        """
        if not self.images:
            raise DataError("a preview has no images to fit; add some")
        z, total = self.channels, self._moments
        pixels = total[z, z]
        mean = total[z] / pixels
        covariance = total / pixels - np.outer(mean, mean)
        inputs, both, colors = covariance[:z, :z], covariance[:z, z + 1 :], covariance[z + 1 :, z + 1 :]
        values, directions = np.linalg.eigh(inputs)
        usable = values > 1e-12 * total.diagonal()[:z].max() / pixels  # smaller ones are rounding
        factors = (directions[:, usable] / values[usable]) @ directions[:, usable].T @ both
        bias = mean[z + 1 :] - mean[:z] @ factors
        variance = np.trace(colors)
        left = variance - 2 * np.sum(factors * both) + np.sum(factors * (inputs @ factors))
        scale, shift = 1 / scaling.scaling_factor, scaling.shift_factor
        if scaling.folded and scaling.measured is not None:
            scale, shift = np.array(scaling.measured.std)[:, None], np.array(scaling.measured.mean)
        return Preview(
            (factors * scale).tolist(),
            (bias + np.broadcast_to(shift, z) @ factors).tolist(),
            float(1 - left / variance) if variance > 1e-12 else None,
            self.images,
            scaling.scaling_factor,
            scaling.shift_factor,
        )

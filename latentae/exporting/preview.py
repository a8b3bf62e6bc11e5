"""A preview of a latent without its decoder: each latent pixel's colour as a linear function of its channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.errors import DataError, ImageError, ModelError

__all__ = ["Preview", "PreviewFit"]


@dataclass(frozen=True)
class Preview:
    """RGB = latent @ factors + bias, in [-1, 1], for a *normalised* latent: (z - shift_factor) * scaling_factor."""

    factors: tuple[tuple[float, float, float], ...]
    """[z][3], red, green and blue of each channel."""
    bias: tuple[float, float, float]
    r2: float | None
    """Share of the colours' variance that the preview explains, over all three colours; None if the images were of one colour."""
    images: int
    """Images it was fitted to."""
    scaling_factor: float
    shift_factor: float

    def apply(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, z, h, w], as a diffusion model makes them -> images [B, 3, h, w] in about [-1, 1] (not clamped).

        Raises:
            ModelError: another number of channels.
        """
        if latents.ndim != 4 or latents.shape[1] != len(self.factors):
            raise ModelError(
                f"latents have shape {tuple(latents.shape)}, this preview reads [B, {len(self.factors)}, h, w]"
            )
        factors, bias = (
            torch.tensor(v, dtype=latents.dtype, device=latents.device) for v in (self.factors, self.bias)
        )
        return torch.einsum("bzhw,zc->bchw", latents, factors) + bias.view(1, 3, 1, 1)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values under the names that user interfaces of diffusion models read."""
        return {
            "latent_rgb_factors": [list(row) for row in self.factors],
            "latent_rgb_factors_bias": list(self.bias),
            "r2": self.r2,
            "images": self.images,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
        }


class PreviewFit:
    """Least squares from normalised latents to images shrunk to their size, over any number of batches in constant memory.

    What is kept are the sums of the normal equations (A'A, A'B and B'B with A the latents and a column of ones), in fp64.

    Args:
        channels: of the latent, z.
        scaling_factor: what a diffusion model multiplies latents by.
        shift_factor: what is subtracted before.
    """

    def __init__(self, channels: int, scaling_factor: float, shift_factor: float) -> None:
        self.channels, self.scaling_factor, self.shift_factor = channels, scaling_factor, shift_factor
        self.images = 0
        self._moments = np.zeros((channels + 4, channels + 4))  # of (latent, 1, colour)

    def add(self, latents_raw: Tensor, images: Tensor) -> None:
        """Take in latents as the encoder gives them, [B, z, h, w], and their images, [B, 3, H, W] in [-1, 1].

        Raises:
            ModelError: another number of latent channels.
            ImageError: not as many RGB images.
            DataError: values that are not finite.
        """
        if latents_raw.ndim != 4 or latents_raw.shape[1] != self.channels:
            raise ModelError(
                f"latents have shape {tuple(latents_raw.shape)}, expected [B, {self.channels}, h, w]"
            )
        if images.ndim != 4 or images.shape[:2] != (len(latents_raw), 3):
            raise ImageError(
                f"images have shape {tuple(images.shape)}, a preview is fitted to RGB: [{len(latents_raw)}, 3, H, W]"
            )
        latents = (latents_raw.cpu().double() - self.shift_factor) * self.scaling_factor
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        colours = F.interpolate(wide, size=latents.shape[2:], mode="area").cpu().double()
        ones = torch.ones_like(colours[:, :1])
        values = (
            torch.cat([latents, ones, colours], dim=1).movedim(1, 0).flatten(1).numpy()
        )  # [z + 4, pixels]
        moments = values @ values.T
        if not np.isfinite(moments).all():
            raise DataError("a preview got latents or images that are not finite; leave them out")
        self._moments += moments
        self.images += len(images)

    def result(self) -> Preview:
        """The fit; where channels depend on each other the smallest factors that explain as much.

        Raises:
            DataError: nothing was added.
        """
        if not self.images:
            raise DataError("a preview has no images to be fitted to; give some")
        z, total = self.channels, self._moments
        pixels = total[z, z]
        mean = total[z] / pixels
        covariance = total / pixels - np.outer(mean, mean)
        inputs, both, colours = covariance[:z, :z], covariance[:z, z + 1 :], covariance[z + 1 :, z + 1 :]
        values, directions = np.linalg.eigh(inputs)
        usable = values > 1e-12 * total.diagonal()[:z].max() / pixels  # below that is rounding
        factors = (directions[:, usable] / values[usable]) @ directions[:, usable].T @ both
        bias = mean[z + 1 :] - mean[:z] @ factors
        variance = np.trace(colours)
        left = variance - 2 * np.sum(factors * both) + np.sum(factors * (inputs @ factors))
        return Preview(
            tuple(map(tuple, factors.tolist())),
            tuple(bias.tolist()),
            float(1 - left / variance) if variance > 1e-12 else None,
            self.images,
            self.scaling_factor,
            self.shift_factor,
        )

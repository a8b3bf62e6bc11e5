"""Transforms that a latent and its image share, for losses that ask the decoder to commute with them.

A side is rounded to whole latent pixels, and the image takes exactly `downsampling` times as many, so that what the decoder makes of a
transformed latent and the transformed image always agree in size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.errors import ImageError

__all__ = ["EQ_SCALES", "Transform", "downscale", "draw_transform"]

EQ_SCALES: tuple[float, ...] = tuple(i / 32 for i in range(8, 33))
"""The scales of EQ-VAE: 0.25, 0.28125, ..., 1."""


@dataclass(frozen=True)
class Transform:
    """Bilinear scaling, then a rotation: tau of EQ-VAE (Kouzelis et al. 2025, arXiv 2502.09509).

    The loss is the whole objective between D(tau.latent(z)) and tau.image(x, f). Scaling is antialiased, unlike in the authors' code:
    below half the size plain interpolation skips pixels, and an image's detail would be noise in the target.
    """

    scale: float
    """Factor for both sides, in (0, 1] as a rule."""
    quarter_turns: int
    """Rotations by 90 degrees, counter-clockwise."""

    def latent(self, z: Tensor) -> Tensor:
        """[B, z, h, w] -> [B, z, h', w'], h' = round(scale h) and at least 1; a quarter turn exchanges the sides."""
        return self._apply(z, 1)

    def image(self, x: Tensor, downsampling: int) -> Tensor:
        """[B, C, H, W] -> [B, C, f h', f w'] for a latent that becomes h' x w'.

        Args:
            x: images.
            downsampling: f, image pixels along a side of a latent pixel.

        Raises:
            ImageError: a side that f does not divide.
        """
        return self._apply(x, downsampling)

    def _apply(self, x: Tensor, unit: int) -> Tensor:
        return torch.rot90(_resize(x, self.scale, unit), self.quarter_turns, dims=(-2, -1))


def draw_transform(uniforms: Sequence[float], scales: Sequence[float] = EQ_SCALES) -> Transform:
    """A scale and a rotation by 90, 180 or 270 degrees, all equally likely, as in EQ-VAE (which transforms every other batch).

    Args:
        uniforms: two numbers in [0, 1), for the scale and for the rotation.
        scales: to choose from.
    """
    scale, turns = uniforms
    return Transform(scales[int(scale * len(scales))], 1 + int(turns * 3))


def downscale(x: Tensor, factor: float, downsampling: int = 1) -> Tensor:
    """Antialiased bilinear shrinking, of a latent or, with its downsampling f, of an image to f times the latent's new sides.

    For the term d(x_down, D(z_down)) of scale equivariance (Skorokhodov et al. 2025, arXiv 2502.14831), 2 to 4 times.

    Args:
        x: [B, C, H, W].
        factor: how many times shorter the sides become.
        downsampling: 1 for a latent; for an image, pixels along a side of a latent pixel.

    Raises:
        ImageError: a side that `downsampling` does not divide.
    """
    return _resize(x, 1.0 / factor, downsampling)


def _resize(x: Tensor, scale: float, unit: int) -> Tensor:
    """Scale sides to whole numbers of `unit` pixels; in at least fp32, half precision is not interpolated everywhere."""
    height, width = x.shape[-2:]
    if height % unit or width % unit:
        raise ImageError(
            f"image is {height} x {width}, expected sides that are multiples of {unit}; crop, pad or resize it first"
        )
    size = [unit * max(1, round(scale * (side // unit))) for side in (height, width)]
    if size == [height, width]:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=False, antialias=True).to(x.dtype)

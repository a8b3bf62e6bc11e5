"""Transforms of a latent and its image, for losses that make the decoder commute with them.

A latent's sides are rounded to pixels, and the image's sides are `downsampling` times as
long. So the decoded transformed latent and the transformed image always have the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.errors import ImageError
from latentae.losses.reconstruction import wide

__all__ = ["EQ_SCALES", "Transform", "downscale", "draw_transform"]

EQ_SCALES: tuple[float, ...] = tuple(i / 32 for i in range(8, 33))
"""The scales of EQ-VAE: 0.25, 0.28125, ..., 1."""


@dataclass(frozen=True)
class Transform:
    """Bilinear scaling, then a rotation: tau of EQ-VAE (Kouzelis et al. 2025, arXiv 2502.09509).

    The loss is the complete objective between D(tau.latent(z)) and tau.image(x, f). Scaling is
    antialiased, unlike in the authors' code: below half the size plain interpolation skips pixels,
    which would put noise into the target.

    Attributes:
        scale: factor of both sides, usually in (0, 1].
        quarter_turns: rotations by 90 degrees, counter-clockwise.
    """

    scale: float
    quarter_turns: int

    def latent(self, z: Tensor) -> Tensor:
        """[B, z, h, w] -> [B, z, h', w'], h' = round(scale h) and at least 1.

        A quarter turn swaps the sides.
        """
        return self.image(z, 1)

    def image(self, x: Tensor, downsampling: int) -> Tensor:
        """[B, C, H, W] -> [B, C, f h', f w'] for a latent that becomes h' x w'.

        Args:
            x: images.
            downsampling: f, image pixels per latent pixel along a side.

        Raises:
            ImageError: f does not divide a side.
        """
        return torch.rot90(_resize(x, self.scale, downsampling), self.quarter_turns, dims=(-2, -1))


def draw_transform(uniforms: Sequence[float], scales: Sequence[float] = EQ_SCALES) -> Transform:
    """A random scale and rotation by 90, 180 or 270 degrees, as in EQ-VAE.

    Args:
        uniforms: two numbers in [0, 1), for scale and rotation.
        scales: to choose from.
    """
    scale, turns = uniforms
    return Transform(scales[int(scale * len(scales))], 1 + int(turns * 3))


def downscale(x: Tensor, factor: float, downsampling: int = 1) -> Tensor:
    """Antialiased bilinear shrinking of a latent, or of an image to f times its sides.

    For the term d(x_down, D(z_down)) of scale equivariance (Skorokhodov et al. 2025, arXiv
    2502.14831), with factors 2 to 4.

    Args:
        x: [B, C, H, W].
        factor: old side over new side.
        downsampling: 1 for a latent; for an image, its pixels per latent pixel along a side.

    Raises:
        ImageError: `downsampling` does not divide a side.
    """
    return _resize(x, 1.0 / factor, downsampling)


def _resize(x: Tensor, scale: float, unit: int) -> Tensor:
    """Scale sides to multiples of `unit` pixels, in at least fp32."""
    height, width = x.shape[-2:]
    if height % unit or width % unit:
        found = f"image is {height} x {width}, expected sides that are multiples of {unit}"
        raise ImageError(f"{found}; crop, pad or resize it first")
    size = [unit * max(1, round(scale * (side // unit))) for side in (height, width)]
    if size == [height, width]:
        return x
    return F.interpolate(wide(x), size=size, mode="bilinear", align_corners=False, antialias=True).to(x.dtype)

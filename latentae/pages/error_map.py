"""Maps of reconstruction errors, on one color scale for all images and models."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from latentae.errors import ImageError

__all__ = ["BRIGHTEST", "TICKS", "color_position", "error_map", "scale_gradient"]

BRIGHTEST = 64.0
"""Error, in levels of 255, from which on the color is the brightest (everywhere: 12 dB PSNR)."""
TICKS = (0, 4, 16, 36, 64)
"""Errors named under the scale, evenly spaced on it."""


def error_map(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Color each pixel by its error, from black (none) to pale yellow (64 levels of 255 or more).

    The error of a pixel is the root mean square over its channels, so maps agree with PSNR. The
    color follows the square root of the error, so that one level (a good reconstruction) and thirty
    (a lost edge) are both visible. Equal colors mean equal errors in all maps. The colors are
    matplotlib's "inferno", whose lightness rises evenly.

    Args:
        original: uint8 [C, H, W].
        reconstruction: uint8, the same shape.

    Returns:
        uint8 [3, H, W] on the CPU.

    Raises:
        ImageError: the shapes differ, or an image is not uint8.
    """
    if original.shape != reconstruction.shape or original.ndim != 3:
        shapes = f"{tuple(original.shape)} and {tuple(reconstruction.shape)}"
        raise ImageError(f"images have shapes {shapes}, expected two equal [C, H, W]")
    if original.dtype != torch.uint8 or reconstruction.dtype != torch.uint8:
        types = f"{original.dtype} and {reconstruction.dtype}"
        raise ImageError(f"images are {types}, expected uint8; round with to_uint8 first")
    error = (original.float() - reconstruction.float()).square().mean(dim=0).sqrt()
    return _colors()[color_position(error).mul(255).round().long().cpu()].permute(2, 0, 1).contiguous()


def color_position(error: Tensor) -> Tensor:
    """Position of an error on the color scale, in [0, 1]: min(sqrt(error / 64), 1)."""
    return (error / BRIGHTEST).clamp(0.0, 1.0).sqrt()


def scale_gradient(steps: int = 12) -> str:
    """The color scale from left to right as a CSS gradient."""
    colors = _colors()[torch.linspace(0, 255, steps).round().long()].tolist()
    return "linear-gradient(to right, " + ", ".join(f"rgb({r} {g} {b})" for r, g, b in colors) + ")"


@cache
def _colors() -> Tensor:
    """uint8 [256, 3]."""
    from matplotlib import colormaps

    return torch.tensor(
        [colormaps["inferno"](level, bytes=True)[:3] for level in range(256)], dtype=torch.uint8
    )

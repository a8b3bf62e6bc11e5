"""Where an image was made wrongly: a heat map on one scale for all images and models, and the legend that explains it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from latentae.errors import ImageError

__all__ = ["BRIGHTEST", "TICKS", "error_heat_map", "heat_gradient", "heat_level"]

BRIGHTEST = 64.0
"""The error, in levels of 255, that the brightest colour stands for, and any larger one: 12 dB where a whole image is as wrong."""
TICKS = (0, 4, 16, 36, 64)
"""Errors that the legend names, evenly spaced on the square-root scale."""


def error_heat_map(original: Tensor, made: Tensor) -> Tensor:
    """Each pixel's error as a colour, from black (none) to pale yellow (64 levels of 255 or more).

    The error of a pixel is the root mean square over its channels, so that maps go with PSNR; the colour follows its square root, so that
    one level (a good reconstruction) and thirty (a lost edge) can both be seen. Neither depends on the image: equal colours are equal
    errors in every map of every model. The colours are matplotlib's "inferno", whose lightness rises evenly, for all eyes.

    Args:
        original: uint8 [C, H, W].
        made: uint8, the same shape.

    Returns:
        uint8 [3, H, W] on the CPU.

    Raises:
        ImageError: shapes differ, or not uint8.
    """
    if original.shape != made.shape or original.ndim != 3:
        raise ImageError(
            f"images have shapes {tuple(original.shape)} and {tuple(made.shape)}, expected two equal [C, H, W]"
        )
    if original.dtype != torch.uint8 or made.dtype != torch.uint8:
        raise ImageError(
            f"images are {original.dtype} and {made.dtype}, expected uint8; round with to_uint8 first"
        )
    error = (original.float() - made.float()).square().mean(dim=0).sqrt()
    return _colours()[heat_level(error).mul(255).round().long().cpu()].permute(2, 0, 1).contiguous()


def heat_level(error: Tensor) -> Tensor:
    """Error in levels of 255 -> place on the colour scale, 0 to 1: sqrt(error / 64), at most 1."""
    return (error / BRIGHTEST).clamp(0.0, 1.0).sqrt()


def heat_gradient(steps: int = 12) -> str:
    """The colour scale from left to right as a CSS gradient."""
    colours = _colours()[torch.linspace(0, 255, steps).round().long()].tolist()
    return "linear-gradient(to right, " + ", ".join(f"rgb({r} {g} {b})" for r, g, b in colours) + ")"


@cache
def _colours() -> Tensor:
    """uint8 [256, 3]."""
    from matplotlib import colormaps

    return torch.tensor(
        [colormaps["inferno"](level, bytes=True)[:3] for level in range(256)], dtype=torch.uint8
    )

"""Crops and value ranges: uint8 images outside, float in [-1, 1] inside."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.errors import ImageError

__all__ = ["random_crop_flip", "resize_and_center_crop", "to_float", "to_uint8"]


def resize_and_center_crop(image: Tensor, size: int) -> Tensor:
    """Resize the short side to `size` (antialiased bicubic) and cut the centre.

    Args:
        image: uint8 [3, H, W].
        size: side of the result in pixels.

    Returns:
        uint8 [3, size, size].
    """
    height, width = _shape(image)
    short = min(height, width)
    if max(height, width) > 4 * short:  # a thin strip enlarged to `size` could fill the memory, and only its centre is wanted
        return resize_and_center_crop(_center(image, min(height, 4 * short), min(width, 4 * short)), size)
    # Cropping before resizing would change the filter at the cut; the long side is rounded as torchvision's Resize does.
    resized = _resize(image, int(size * height / short), int(size * width / short))
    return _center(resized, size, size)


def random_crop_flip(
    image: Tensor, size: int, *, scale: tuple[float, float] = (1.0, 1.0), seed: int, flip: bool = True
) -> Tensor:
    """Cut a random square, resize it to `size` (antialiased bicubic) and mirror it half of the time.

    The side of the square is drawn log-uniformly between the two shares of the short side, but never below `size` source pixels
    where the image has them: (1, 1) is LDM's resize of the short side and crop, (0, 0) crops at native scale, (0, 1) mixes.
    A pure function of its arguments, on every platform and library version.

    Args:
        image: uint8 [3, H, W].
        size: side of the result in pixels.
        scale: smallest and largest share of the short side, 0 to 1.
        seed: 0 <= seed < 2**64.
        flip: whether to mirror at all.

    Returns:
        uint8 [3, size, size].
    """
    height, width = _shape(image)
    draws = np.random.Philox(key=seed).random_raw(4) >> np.uint64(11)
    share, down, right, mirror = (float(draw) * 2.0**-53 for draw in draws)  # uniform in [0, 1)
    short = min(height, width)
    lowest, highest = (min(max(bound * short, size), short) for bound in scale)
    side = round(math.exp(math.log(lowest) + share * (math.log(highest) - math.log(lowest))))
    top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
    crop = _resize(image[:, top : top + side, left : left + side], size, size)
    return crop.flip(2) if flip and mirror < 0.5 else crop


def _shape(image: Tensor) -> tuple[int, int]:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ImageError(
            f"expected a uint8 image [3, H, W], found {image.dtype} {list(image.shape)}; decode it with decode_image"
        )
    return image.shape[1], image.shape[2]


def _center(image: Tensor, height: int, width: int) -> Tensor:
    top, left = round((image.shape[1] - height) / 2), round((image.shape[2] - width) / 2)
    return image[:, top : top + height, left : left + width]


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True, align_corners=False)[0]


def to_float(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32 in [-1, 1], on the same device."""
    return images.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8: rounded to the nearest of 256 levels, values outside clamped, on the same device."""
    return images.detach().to(torch.float32).add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)

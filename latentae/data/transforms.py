"""Crops and value ranges: uint8 or uint16 images outside, float in [-1, 1] inside.

Every resize is antialiased bicubic. Random crops and flips are pure functions of a seed, on every
platform and library version. With 4 channels, colors are multiplied by alpha before resizing, as in
Pillow, so that invisible colors do not bleed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.data.options import DataOptions
from latentae.errors import ImageError
from latentae.keyed import whole_seed

__all__ = [
    "augment",
    "covering_size",
    "crop_to_bucket",
    "kept_short_side",
    "keyed_flip",
    "pad_to_multiple",
    "random_crop_flip",
    "random_resized_crop_flip",
    "resize_and_center_crop",
    "to_float",
    "to_uint8",
    "to_uint16",
]

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of random-resized crops, as in torchvision
ATTEMPTS = 10  # draws of a random-resized crop before the center is taken, as in torchvision


def resize_and_center_crop(image: Tensor, size: int) -> Tensor:
    """Resize the short side to `size` and crop the center.

    Args:
        image: uint8 or uint16 [C, H, W] with 1, 3 or 4 channels.
        size: side of the result in pixels.

    Returns:
        [C, size, size] of the image's type.
    """
    return crop_to_bucket(image, (size, size))


def crop_to_bucket(image: Tensor, bucket: tuple[int, int], *, seed: int | None = None) -> Tensor:
    """Resize the image until it covers the bucket, and crop the rest.

    Args:
        image: uint8 or uint16 [C, H, W].
        bucket: height and width of the result in pixels.
        seed: of the crop position, 0 <= seed < 2**64; None crops the center.

    Returns:
        [C, *bucket] of the image's type.
    """
    high, wide = bucket
    height, width = _shape(image)
    # A thin strip enlarged to the bucket could fill the memory, although little of it is needed.
    most_high, most_wide = max(4 * width * high // wide, 1), max(4 * height * wide // high, 1)
    if height > most_high or width > most_wide:
        strip = _cut(image, min(height, most_high), min(width, most_wide), seed)
        return crop_to_bucket(strip, bucket, seed=seed)
    # Cropping first would change the filter at the edge.
    return _cut(_resize(image, *covering_size(height, width, bucket)), high, wide, seed)


def covering_size(height: int, width: int, bucket: tuple[int, int]) -> tuple[int, int]:
    """The smallest height and width that cover a bucket at an image's aspect ratio, in pixels.

    The long side is rounded down as in torchvision's Resize.
    """
    high, wide = bucket
    if width * high >= wide * height:
        return high, max(int(high * width / height), wide)
    return max(int(wide * height / width), high), wide


def random_crop_flip(
    image: Tensor, size: int, *, scale: tuple[float, float] = (1.0, 1.0), seed: int, flip: bool = True
) -> Tensor:
    """Crop a random square, resize it to `size` and flip it half of the time.

    The side of the square is drawn log-uniformly between two shares of the short side. It is at
    least `size` source pixels if the image is large enough. (1, 1) is LDM's resize and crop, (0, 0)
    crops at native scale, and (0, 1) mixes both.

    Args:
        image: uint8 or uint16 [C, H, W].
        size: side of the result in pixels.
        scale: smallest and largest share of the short side, 0 to 1.
        seed: 0 <= seed < 2**64.
        flip: flip half of the time.

    Returns:
        [C, size, size] of the image's type.
    """
    height, width = _shape(image)
    share, down, right, mirror = _uniform(seed, 4)
    short = min(height, width)
    lowest, highest = (min(max(bound * short, size), short) for bound in scale)
    side = round(math.exp(math.log(lowest) + share * (math.log(highest) - math.log(lowest))))
    top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
    crop = _resize(image[:, top : top + side, left : left + side], size, size)
    return crop.flip(2) if flip and mirror < 0.5 else crop


def random_resized_crop_flip(
    image: Tensor,
    size: int,
    *,
    area: tuple[float, float] = AREA,
    ratio: tuple[float, float] = RATIO,
    seed: int,
    flip: bool = True,
) -> Tensor:
    """torchvision's RandomResizedCrop and a random flip, as functions of a seed.

    The share of the image's area is uniform and the aspect ratio log-uniform (Szegedy et al. 2015,
    section 6). A draw that does not fit is repeated. After ten draws the crop is the largest
    centered rectangle with a ratio in range.

    Args:
        image: uint8 or uint16 [C, H, W].
        size: side of the result in pixels.
        area: smallest and largest share of the image's area, 0 to 1.
        ratio: smallest and largest width / height of the rectangle, before it becomes a square.
        seed: 0 <= seed < 2**64.
        flip: flip half of the time.

    Returns:
        [C, size, size] of the image's type.
    """
    height, width = _shape(image)
    draws = _uniform(seed, 2 * ATTEMPTS + 3)
    for share, shape in zip(draws[3::2], draws[4::2], strict=True):
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** shape
        pixels = (area[0] + share * (area[1] - area[0])) * height * width
        high, wide = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < high <= height and 0 < wide <= width:
            top, left = int(draws[0] * (height - high + 1)), int(draws[1] * (width - wide + 1))
            break
    else:
        aspect = min(max(width / height, ratio[0]), ratio[1])
        high, wide = min(height, max(round(width / aspect), 1)), min(width, max(round(height * aspect), 1))
        top, left = (height - high) // 2, (width - wide) // 2
    crop = _resize(image[:, top : top + high, left : left + wide], size, size)
    return crop.flip(2) if flip and draws[2] < 0.5 else crop


def augment(image: Tensor, options: DataOptions, seed: int, bucket: tuple[int, int] | None = None) -> Tensor:
    """The training crop of a recipe: a pure function of its arguments.

    Args:
        image: uint8 or uint16 [C, H, W].
        options: the `[data]` table.
        seed: 0 <= seed < 2**64.
        bucket: height and width of an aspect-ratio bucket; None crops a square of
            `options.resolution`.

    Returns:
        [C, height, width] of the image's type.
    """
    size = options.resolution
    if bucket is None and options.crop == "random":
        scale = (options.scale_min, options.scale_max)
        return random_crop_flip(image, size, scale=scale, seed=seed, flip=options.flip)
    if bucket is None and options.crop == "random-resized":
        return random_resized_crop_flip(image, size, seed=seed, flip=options.flip)
    cut = crop_to_bucket(image, bucket or (size, size), seed=None if options.crop == "center" else seed)
    return keyed_flip(cut, seed ^ 1) if options.flip else cut


def kept_short_side(options: DataOptions, bucket: tuple[int, int] | None = None) -> int | None:
    """Smallest short side in pixels that `augment` keeps, over all seeds.

    None if it crops at native scale.
    """
    if bucket is None and options.crop == "random-resized":
        return math.ceil(options.resolution / math.sqrt(AREA[0] * RATIO[0]))  # of the smallest rectangle
    if bucket is None and options.crop == "random":
        return math.ceil(options.resolution / options.scale_min) if options.scale_min else None
    return max(bucket or (options.resolution,))


def keyed_flip(image: Tensor, seed: int) -> Tensor:
    """Flip [C, H, W] left to right for half of the seeds."""
    return image.flip(2) if _uniform(seed, 1)[0] < 0.5 else image


def pad_to_multiple(images: Tensor, factor: int) -> Tensor:
    """Reflect images at their right and bottom edges until both sides are multiples of `factor`.

    `[..., :H, :W]` undoes it.

    The edge itself is not repeated. An image smaller than its padding is reflected several times.

    Args:
        images: float or uint8 [..., H, W].
        factor: pixels.

    Returns:
        [..., H', W'], less than `factor` larger on each side; the same tensor if no padding is
        needed.
    """
    for axis in (-2, -1):
        side = images.shape[axis]
        if side % factor:
            order = np.pad(np.arange(side), (0, -side % factor), mode="reflect")
            images = images.index_select(axis, torch.from_numpy(order).to(images.device))
    return images


def _uniform(seed: int, count: int) -> list[float]:
    """Uniform in [0, 1), by Philox. Generator's methods may change between versions (NEP 19)."""
    draws = np.random.Philox(key=whole_seed(seed)).random_raw(count) >> np.uint64(11)
    return [float(draw) * 2.0**-53 for draw in draws]


def _shape(image: Tensor) -> tuple[int, int]:
    known = image.dtype in (torch.uint8, torch.uint16)
    if not known or image.ndim != 3 or image.shape[0] not in (1, 3, 4) or not image.numel():
        expected = "expected a uint8 or uint16 image [1, 3 or 4, H, W]"
        found = f"found {image.dtype} {list(image.shape)}"
        raise ImageError(f"{expected}, {found}; decode it with decode_image")
    return image.shape[1], image.shape[2]


def _cut(image: Tensor, height: int, width: int, seed: int | None) -> Tensor:
    """Crop the center, or at a random position by a seed."""
    over = image.shape[1] - height, image.shape[2] - width
    if seed is None:
        top, left = (round(side / 2) for side in over)
    else:
        top, left = (int(draw * (side + 1)) for draw, side in zip(_uniform(seed, 2), over, strict=True))
    return image[:, top : top + height, left : left + width]


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[1:] == (height, width):
        return image
    if image.shape[0] == 4 and bool((image[3] != torch.iinfo(image.dtype).max).any()):
        return _resize_transparent(image, height, width)
    if image.dtype == torch.uint8:
        return _bicubic(image, height, width)
    return _round(_bicubic(image.to(torch.float32), height, width), image.dtype)


def _resize_transparent(image: Tensor, height: int, width: int) -> Tensor:
    top = torch.iinfo(image.dtype).max
    values = image.to(torch.float32)
    resized = _bicubic(torch.cat([values[:3] * (values[3:] / top), values[3:]]), height, width)
    alpha = _round(resized[3:], image.dtype)
    visible = alpha.to(torch.float32).clamp_(min=1.0) / top
    return torch.cat([_round(resized[:3] / visible, image.dtype), alpha])


def _bicubic(image: Tensor, height: int, width: int) -> Tensor:
    # uint8 in [H, W, C] memory has a vectorized path with 16-bit weights: within two levels of
    # Pillow, and five times as fast. A crop is copied into this layout first. Otherwise the result
    # would be planar, and joining a batch a fifth slower.
    batch = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(batch, (height, width), mode="bicubic", antialias=True, align_corners=False)[0]


def _round(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.round().clamp_(0, torch.iinfo(dtype).max).to(dtype)


def to_float(images: Tensor) -> Tensor:
    """uint8 or uint16 [..., C, H, W] -> float32 in [-1, 1], on the same device."""
    half = 32767.5 if images.dtype == torch.uint16 else 127.5
    return images.to(torch.float32).div_(half).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8, rounded and clamped, on the same device."""
    return _levels(images, torch.uint8)


def to_uint16(images: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint16, rounded and clamped, on the same device."""
    return _levels(images, torch.uint16)


def _levels(images: Tensor, dtype: torch.dtype) -> Tensor:
    top = torch.iinfo(dtype).max
    return images.detach().to(torch.float32).add(1.0).mul_(top / 2).round_().clamp_(0, top).to(dtype)

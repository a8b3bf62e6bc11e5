"""Paths, Pillow images, arrays and tensors to image tensors and back, as in docs/images.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from latentae.data.decode import MAX_PIXELS, read_image
from latentae.data.headers import orientation
from latentae.data.pixels import fit, read_pixels, upright
from latentae.data.transforms import to_uint8, to_uint16
from latentae.errors import ImageError, RecipeError
from latentae.pages.images import pil_image

__all__ = ["OUTPUTS", "ImageLike", "check_output", "each_image", "present", "read"]

ImageLike: TypeAlias = "str | Path | Image.Image | NDArray[Any] | Tensor"
"""A path, a Pillow image, an array [H, W] or [H, W, C] (uint8 or uint16), or a tensor [C, H, W]
(uint8, uint16, or float in [-1, 1])."""

OUTPUTS = ("pil", "numpy", "numpy16", "tensor")

_EXPECTED = "a path, a Pillow image, a uint8 or uint16 array [H, W, C], or a tensor [C, H, W]"
_LARGEST = 2.0  # float images may exceed [-1, 1] a little after a resize, but not reach 255
_CONVERTIBLE = (1, 3, 4)  # gray, RGB and RGBA convert to each other


def each_image(images: ImageLike | Iterable[ImageLike]) -> Iterator[ImageLike]:
    """The images of a batch, a list or any other iterable. A single image is a list of one."""
    if isinstance(images, (str, Path, Image.Image)):
        return iter([images])
    if isinstance(images, (Tensor, np.ndarray)):
        return iter(images if images.ndim == 4 else [images])
    try:
        return iter(images)
    except TypeError:
        raise ImageError(
            f"found a {type(images).__name__}, expected {_EXPECTED}, or a list of these"
        ) from None


def read(image: ImageLike, channels: int, name: str, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read one image with the model's channels, not yet scaled to [-1, 1].

    Args:
        image: see `ImageLike`.
        channels: of the model. Files, Pillow images and integer pixels convert between 1, 3 and 4
            channels as in `decode_image`. Other numbers of channels and float must match.
        name: of the image, for error messages.
        max_pixels: limit for files.

    Returns:
        uint8, uint16 or float32 [channels, H, W].

    Raises:
        ImageError: the image is no image, damaged, empty, of other channels, or float far outside
            [-1, 1].
    """
    if isinstance(image, (str, Path)):
        if channels not in _CONVERTIBLE:
            raise ImageError(
                f"image {name}: files have 1, 3 or 4 channels, the model {channels}; give a tensor [C, H, W]"
            )
        return read_image(image, channels=channels, bits=None, max_pixels=max_pixels)
    if isinstance(image, Image.Image):
        return _from_pixels(_pil_pixels(image, name), channels, name)
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or image.dtype not in (np.uint8, np.uint16):
            hint = "; give floats as a tensor [C, H, W] in [-1, 1]" if image.dtype.kind == "f" else ""
            raise ImageError(
                f"image {name} is {image.dtype} {list(image.shape)}, expected uint8 or uint16 [H, W, C]{hint}"
            )
        return _from_pixels(image if image.ndim == 3 else image[..., None], channels, name)
    if not isinstance(image, Tensor):
        raise ImageError(f"image {name} is a {type(image).__name__}, expected {_EXPECTED}")
    if image.ndim == 3 and image.dtype in (torch.uint8, torch.uint16):
        return _from_pixels(image.permute(1, 2, 0).cpu().numpy(), channels, name)
    if image.ndim == 3 and image.is_floating_point():
        return _from_float(image, channels, name)
    raise ImageError(
        f"image {name} is {image.dtype} {list(image.shape)}, expected uint8, uint16 or float [C, H, W]"
    )


def _pil_pixels(image: Image.Image, name: str) -> NDArray[Any]:
    """Pixels as `decode_image` reads them. Pillow keeps 8 bits of 16-bit color."""
    try:
        image.load()
        return upright(read_pixels(image, lambda: image, b"", name, 8), orientation(image))
    except ImageError:
        raise
    except Exception as error:  # Pillow reads lazily and raises nearly anything on damaged files
        raise ImageError(
            f"image {name} is damaged ({type(error).__name__}: {error}); replace or remove it"
        ) from error


def _from_pixels(pixels: NDArray[Any], channels: int, name: str) -> Tensor:
    """uint8 or uint16 [H, W, n] -> [channels, H, W] of the same type."""
    found = pixels.shape[2]
    if not pixels.size:
        raise ImageError(f"image {name} is empty: {list(pixels.shape)}")
    if found != channels:
        if channels not in _CONVERTIBLE or found > max(_CONVERTIBLE):
            raise ImageError(
                f"image {name} has {found} channels, the model {channels}; only 1 to 4 convert to 1, 3 or 4"
            )
        pixels = fit(pixels, channels, 8 * pixels.dtype.itemsize)
    writable = np.require(pixels, requirements=["C", "W"])  # torch warns about read-only memory
    return torch.from_numpy(writable).permute(2, 0, 1)


def _from_float(image: Tensor, channels: int, name: str) -> Tensor:
    if image.shape[0] != channels or not image.numel():
        raise ImageError(
            f"image {name} is float {list(image.shape)}, the model takes [{channels}, H, W]; convert it first"
        )
    image = image.detach().to(torch.float32)
    low, high = (float(value) for value in image.aminmax())
    if not -_LARGEST <= low <= high <= _LARGEST:
        raise ImageError(
            f"image {name} has values from {low:g} to {high:g}, expected floats in [-1, 1]; scale it, "
            "or give uint8"
        )
    return image


def check_output(output: str, channels: int) -> None:
    """Check before computing that `present` can return the output.

    Raises:
        RecipeError: the output is unknown, or Pillow has no images of these channels.
    """
    if output not in OUTPUTS:
        raise RecipeError(f"output is {output!r}, expected one of {', '.join(OUTPUTS)}")
    if output == "pil" and channels not in _CONVERTIBLE:
        raise RecipeError(
            f"the model returns {channels} channels, but Pillow needs 1, 3 or 4; use output='numpy' or "
            "'tensor'"
        )


def present(image: Tensor, output: str) -> Any:
    """Convert float [C, H, W] in [-1, 1] to one of `OUTPUTS`, clamped.

    "pil" is an 8-bit Pillow image (gray, RGB or RGBA), "numpy" uint8 [H, W, C], "numpy16" uint16
    [H, W, C], "tensor" float32 [C, H, W] in [-1, 1] on the same device.
    """
    if output == "tensor":
        return image.to(torch.float32).clamp(-1.0, 1.0)
    if output == "pil":
        return pil_image(to_uint8(image))
    pixels = to_uint8(image) if output == "numpy" else to_uint16(image)
    return np.ascontiguousarray(pixels.cpu().permute(1, 2, 0).numpy())

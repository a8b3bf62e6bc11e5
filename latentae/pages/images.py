"""Grids of images, error maps, PNG files, and images for the templates of pages."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentae.errors import ImageError
from latentae.files import atomic_file

__all__ = [
    "BRIGHTEST",
    "LARGEST",
    "TICKS",
    "color_position",
    "error_map",
    "image_grid",
    "picture",
    "pil_image",
    "png_bytes",
    "read_png",
    "scale_gradient",
    "shrink",
    "write_png",
]

LARGEST = 512
"""Maximum length of the longer side of a picture on a page, in pixels."""
CRISP = 192  # pictures up to this side are enlarged without smoothing: their pixels are what matters
BRIGHTEST = 64.0
"""Error, in levels of 255, from which on the color is the brightest (everywhere: 12 dB PSNR)."""
TICKS = (0, 4, 16, 36, 64)
"""Errors named under the scale, evenly spaced on it."""


def image_grid(
    rows: Sequence[Sequence[Tensor]], *, padding: int = 4, background: int = 255, columns: int = 8
) -> Tensor:
    """Arrange rows of images as one picture, with aligned columns.

    Args:
        rows: rows of equal length, of uint8 [1, 3 or 4, H, W] tensors of any sizes. Gray becomes
            RGB, and alpha is left out.
        padding: pixels around each image.
        background: gray value between the images.
        columns: maximum number of columns; longer rows continue in another band of rows below.

    Returns:
        uint8 [3, H, W].

    Raises:
        ImageError: there is no image, rows differ in length, or an image has another type or shape.
    """
    images = [image for row in rows for image in row]
    if not images or len({len(row) for row in rows}) != 1:
        raise ImageError(
            f"rows have {[len(row) for row in rows]} images, expected rows of equal length, not empty"
        )
    for image in images:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3, 4):
            found = f"an image is {image.dtype} {tuple(image.shape)}"
            raise ImageError(f"{found}, expected uint8 [1, 3 or 4, H, W]; convert it first")
    bands = [[row[start : start + columns] for row in rows] for start in range(0, len(rows[0]), columns)]
    pictures = [_band(band, padding, background) for band in bands]
    height = sum(picture.shape[1] for picture in pictures) + padding
    width = max(picture.shape[2] for picture in pictures)
    grid = torch.full((3, height, width), background, dtype=torch.uint8)
    top = 0
    for picture in pictures:
        grid[:, top : top + picture.shape[1], : picture.shape[2]] = picture
        top += picture.shape[1]
    return grid


def _band(rows: Sequence[Sequence[Tensor]], padding: int, background: int) -> Tensor:
    heights = [max(image.shape[1] for image in row) for row in rows]
    widths = [max(row[index].shape[2] for row in rows) for index in range(len(rows[0]))]
    picture = torch.full(
        (3, sum(heights) + padding * len(heights), sum(widths) + padding * (len(widths) + 1)),
        background,
        dtype=torch.uint8,
    )
    top = padding
    for row, height in zip(rows, heights, strict=True):
        left = padding
        for image, width in zip(row, widths, strict=True):
            picture[:, top : top + image.shape[1], left : left + image.shape[2]] = image[:3].cpu()
            left += width + padding
        top += height + padding
    return picture


def pil_image(image: Tensor) -> Image.Image:
    """Convert uint8 [C, H, W] to a Pillow image: gray, RGB or RGBA for 1, 3 or 4 channels."""
    pixels = np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy())
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def png_bytes(image: Tensor) -> bytes:
    """Encode uint8 [3, H, W] as a PNG file (lossless: a report must not compress what it shows)."""
    buffer = io.BytesIO()
    pil_image(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_png(path: str | Path, image: Tensor) -> None:
    """Write uint8 [3, H, W] as a PNG file, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(png_bytes(image))


def read_png(path: str | Path) -> Tensor:
    """Read a PNG file as uint8 [3, H, W]; gray is repeated, transparency becomes white."""
    with Image.open(path) as image:
        if image.mode in ("RGBA", "LA"):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def shrink(image: Tensor, limit: int = LARGEST) -> Tensor:
    """Shrink uint8 [3, H, W] by area averages to at most `limit` pixels a side."""
    height, width = image.shape[1:]
    if max(height, width) <= limit:
        return image
    times = limit / max(height, width)
    size = (max(round(width * times), 1), max(round(height * times), 1))
    small = pil_image(image).resize(size, Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()


def picture(image: Tensor, label: str, detail: str = "") -> dict[str, Any]:
    """Prepare uint8 [3, H, W] for `ui.picture`, with a label and a detail under it."""
    height, width = image.shape[1:]
    src = "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")
    crisp = max(height, width) <= CRISP
    return {"src": src, "width": width, "height": height, "crisp": crisp, "label": label, "detail": detail}


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

"""Pictures: grids of images, PNG bytes and files."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentae.errors import ImageError
from latentae.files import atomic_file

__all__ = ["data_uri", "image_grid", "pil_image", "png_bytes", "write_png"]


def image_grid(
    rows: Sequence[Sequence[Tensor]], *, padding: int = 4, background: int = 255, columns: int = 8
) -> Tensor:
    """Rows of images as one picture; the images of a column stand under each other.

    Args:
        rows: each row uint8 [3, H, W] tensors (sizes may differ), the rows equally long.
        padding: pixels around each image.
        background: gray value between the images.
        columns: a longer row is broken into bands of that many columns, each band holding all the rows.

    Returns:
        uint8 [3, H, W].

    Raises:
        ImageError: no image, rows of different lengths, or another type or shape.
    """
    images = [image for row in rows for image in row]
    if not images or len({len(row) for row in rows}) != 1:
        raise ImageError(
            f"a grid needs equally long rows of images, got rows of {[len(row) for row in rows]}"
        )
    for image in images:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ImageError(f"a grid takes uint8 [3, H, W] images, got {image.dtype} {tuple(image.shape)}")
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
            picture[:, top : top + image.shape[1], left : left + image.shape[2]] = image.cpu()
            left += width + padding
        top += height + padding
    return picture


def pil_image(image: Tensor) -> Image.Image:
    """uint8 [C, H, W] -> a Pillow image: gray, RGB or RGBA for 1, 3 or 4 channels."""
    pixels = np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy())
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def png_bytes(image: Tensor) -> bytes:
    """uint8 [3, H, W] -> the bytes of a PNG file (lossless: a report must not compress what it shows)."""
    buffer = io.BytesIO()
    pil_image(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_png(path: str | Path, image: Tensor) -> None:
    """Write uint8 [3, H, W] as a PNG file, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(png_bytes(image))


def data_uri(image: Tensor) -> str:
    """uint8 [3, H, W] -> a PNG as a `data:` address, for pages that open offline."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")

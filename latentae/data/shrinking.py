"""Smaller image files: resized by the short side and encoded again, as PNG or JPEG. Images that are small enough stay as they are."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from latentae.data.decode import MAX_PIXELS, decode_image
from latentae.data.transforms import crop_to_bucket
from latentae.errors import DataError, ImageError

__all__ = ["encode_jpeg", "encode_png", "shrink"]

_PNG_COLOUR = {
    1: 0,
    3: 2,
    4: 6,
}  # colour type of an IHDR chunk for each number of channels; PNG specification, section 11.2.1
_JPEG = b"\xff\xd8"  # has no transparency
_CAN_BE_DEEP = (b"\x89PNG", b"II", b"MM", b"P")  # PNG, TIFF, PPM


def shrink(
    data: bytes, name: str, short: int, quality: int | None, *, max_pixels: int = MAX_PIXELS
) -> tuple[str, bytes] | None:
    """Resize an image file so that its short side is `short`, by antialiased bicubic, and encode it again.

    The result is upright and in sRGB, by the rules of docs/images.md. PNG keeps gray, transparency and 16 bits; JPEG lays
    transparency over white and has 8 bits.

    Args:
        data: the file's bytes.
        name: what error messages call it.
        short: pixels of the short side.
        quality: of a JPEG without chroma subsampling, 1 to 100; None is PNG.
        max_pixels: as in `decode_image`.

    Returns:
        Extension and bytes of the new file; None where the short side has `short` pixels or fewer: images are never enlarged.

    Raises:
        ImageError: as `decode_image`, also for an image that stays as it is.
    """
    image = _decode(data, name, quality is None, max_pixels, short)
    height, width = image.shape[1:]
    side = min(height, width)
    if side <= short:
        return None
    resized = crop_to_bucket(
        image, (height * short // side, width * short // side)
    )  # of the same shape, so nothing is cut off
    return ("png", encode_png(resized)) if quality is None else ("jpg", encode_jpeg(resized, quality))


def encode_png(image: Tensor) -> bytes:
    """uint8 or uint16 [1, 3 or 4, H, W] -> the bytes of a PNG file, lossless."""
    channels, height, width = image.shape
    if channels not in _PNG_COLOUR or image.dtype not in (torch.uint8, torch.uint16):
        raise DataError(
            f"can't write {image.dtype} {list(image.shape)} as PNG; expected uint8 or uint16 [1, 3 or 4, H, W]"
        )
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    if image.dtype == torch.uint8:
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, "PNG")
        return file.getvalue()
    # Pillow writes no 16-bit colour. Each row is stored as the difference to the one above: filter 2 of PNG's section 9.
    rows = pixels.astype(">u2").view(np.uint8).reshape(height, -1)
    above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    lines = np.hstack([np.full((height, 1), 2, np.uint8), rows - above])
    header = struct.pack(">IIBBBBB", width, height, 16, _PNG_COLOUR[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def encode_jpeg(image: Tensor, quality: int) -> bytes:
    """uint8 [1 or 3, H, W] -> the bytes of a JPEG file with as many samples of colour as of light."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if image.shape[0] == 1 else pixels).save(
        file, "JPEG", quality=quality, subsampling=0
    )
    return file.getvalue()


def _decode(data: bytes, name: str, keep: bool, max_pixels: int, short: int) -> Tensor:
    """With as few channels and bits as hold every pixel; `keep` keeps transparency and 16 bits at all."""
    image = _deep(data, name, max_pixels) if keep else None
    if image is None:
        channels = 4 if keep and not data.startswith(_JPEG) else 3
        image = decode_image(data, name, channels=channels, max_pixels=max_pixels, short=short)
    opaque = torch.iinfo(image.dtype).max
    if len(image) == 4 and _all(image, lambda pixels: pixels[3] == opaque):
        image = image[:3]
    if len(image) == 3 and _all(image, lambda pixels: (pixels[0] == pixels[1]) & (pixels[0] == pixels[2])):
        image = image[:1]
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # the layout in which resizing is fast


def _all(image: Tensor, test: Callable[[NDArray[Any]], NDArray[np.bool_]]) -> bool:
    """Whether all pixels pass a test; most images fail it at one of a few."""
    pixels = image.numpy()
    return bool(test(pixels[:, ::32, ::32]).all()) and bool(test(pixels).all())


def _deep(data: bytes, name: str, max_pixels: int) -> Tensor | None:
    """uint16 [4, H, W] of a file that has more than 8 bits; None for all others."""
    if not data.startswith(_CAN_BE_DEEP):
        return None
    try:
        image = decode_image(data, name, channels=4, bits=16, max_pixels=max_pixels)
    except (
        ImageError
    ):  # deep, but can be had with 8 bits only, which is how training would read it; or no image at all
        return None
    widened = bool((image.numpy() % 257 == 0).all())
    return None if widened else image

"""Shrink image files: resize them by the short side and encode them as PNG or JPEG.

Small images stay unchanged.
"""

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

_PNG_COLOR = {1: 0, 3: 2, 4: 6}  # channels -> color type of an IHDR chunk; PNG specification, section 11.2.1
_JPEG = b"\xff\xd8"  # has no transparency
_CAN_BE_DEEP = (b"\x89PNG", b"II", b"MM", b"P")  # PNG, TIFF, PPM


def shrink(
    data: bytes, name: str, short: int, quality: int | None, *, max_pixels: int = MAX_PIXELS
) -> tuple[str, bytes] | None:
    """Resize an image file by antialiased bicubic, and encode it again.

    The result is upright and in sRGB, by the rules of docs/images.md. PNG keeps gray, transparency
    and 16 bits. JPEG has 8 bits, and transparency becomes white.

    Args:
        data: the file's bytes.
        name: its name in error messages.
        short: pixels of the short side.
        quality: of a JPEG without chroma subsampling, 1 to 100; None is PNG.
        max_pixels: as in `decode_image`.

    Returns:
        Extension and bytes of the new file; None if the short side is at most `short`, as images
        are never enlarged.

    Raises:
        ImageError: as `decode_image`, also for an unchanged image.
    """
    image = _decode(data, name, quality is None, max_pixels, short)
    height, width = image.shape[1:]
    side = min(height, width)
    if side <= short:
        return None
    resized = crop_to_bucket(image, (height * short // side, width * short // side))  # without a crop
    return ("png", encode_png(resized)) if quality is None else ("jpg", encode_jpeg(resized, quality))


def encode_png(image: Tensor) -> bytes:
    """uint8 or uint16 [1, 3 or 4, H, W] -> the bytes of a PNG file, lossless."""
    channels, height, width = image.shape
    if channels not in _PNG_COLOR or image.dtype not in (torch.uint8, torch.uint16):
        found = f"{image.dtype} {list(image.shape)}"
        raise DataError(f"can't write {found} as PNG; expected uint8 or uint16 [1, 3 or 4, H, W]")
    if image.dtype == torch.uint8:
        return _save(image, "PNG")
    # Pillow writes no 16-bit color. Each row is stored as its difference to the row above: filter
    # 2, PNG section 9.
    rows = image.permute(1, 2, 0).contiguous().numpy().astype(">u2").view(np.uint8).reshape(height, -1)
    above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    lines = np.hstack([np.full((height, 1), 2, np.uint8), rows - above])
    header = struct.pack(">IIBBBBB", width, height, 16, _PNG_COLOR[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def encode_jpeg(image: Tensor, quality: int) -> bytes:
    """uint8 [1 or 3, H, W] -> the bytes of a JPEG file without chroma subsampling."""
    return _save(image, "JPEG", quality=quality, subsampling=0)


def _save(image: Tensor, form: str, **options: Any) -> bytes:
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(file, form, **options)
    return file.getvalue()


def _decode(data: bytes, name: str, keep: bool, max_pixels: int, short: int) -> Tensor:
    """Decode with as few channels and bits as the pixels need.

    Without `keep`, without transparency and 16 bits.
    """
    image = _deep(data, name, max_pixels) if keep else None
    if image is None:
        channels = 4 if keep and not data.startswith(_JPEG) else 3
        image = decode_image(data, name, channels=channels, max_pixels=max_pixels, short=short)
    opaque = torch.iinfo(image.dtype).max
    if len(image) == 4 and _all(image, lambda pixels: pixels[3] == opaque):
        image = image[:3]
    if len(image) == 3 and _all(image, lambda pixels: (pixels[0] == pixels[1]) & (pixels[0] == pixels[2])):
        image = image[:1]
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # the layout for fast resizing


def _all(image: Tensor, test: Callable[[NDArray[Any]], NDArray[np.bool_]]) -> bool:
    """Whether all pixels pass a test. Most images already fail it on a coarse grid."""
    pixels = image.numpy()
    return bool(test(pixels[:, ::32, ::32]).all()) and bool(test(pixels).all())


def _deep(data: bytes, name: str, max_pixels: int) -> Tensor | None:
    """uint16 [4, H, W] of a file with more than 8 bits; None for all others."""
    if not data.startswith(_CAN_BE_DEEP):
        return None
    try:
        image = decode_image(data, name, channels=4, bits=16, max_pixels=max_pixels)
    except ImageError:  # no image, or its 16 bits can't be decoded, so training would read 8 bits too
        return None
    widened = bool((image.numpy() % 257 == 0).all())
    return None if widened else image

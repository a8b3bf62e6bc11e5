"""Image files, written by Pillow or byte by byte."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def noise(*shape: int, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def saved(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    height: int,
    width: int,
    rows: bytes = bytes(1000),
    bits: int = 8,
    color: int = 2,
    interlaced: int = 0,
    extra: bytes = b"",
) -> bytes:
    """A PNG with this header, with any rows; `extra` are chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body

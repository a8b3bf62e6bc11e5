from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from latentae.data.decode import ImageKind, image_kind
from latentae.errors import ImageError


def stored(pixels, mode=None, kind="png"):
    buffer = io.BytesIO()
    (Image.fromarray(pixels) if mode is None else Image.fromarray(pixels).convert(mode)).save(buffer, kind)
    return {"__key__": "a", kind: buffer.getvalue()}


RGB, GRAY, DEEP = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8), np.zeros((4, 5), np.uint16)


@pytest.mark.parametrize(
    ("raw", "gray", "deep"),
    [
        (stored(RGB), False, False),
        (stored(RGB, "P"), False, False),
        (stored(RGB, "RGBA"), False, False),
        (stored(GRAY), True, False),
        (stored(GRAY, "1"), True, False),
        (stored(GRAY, "LA"), True, False),
        (stored(GRAY, kind="jpeg"), True, False),
        (stored(DEEP), True, True),
        (stored(DEEP, kind="tiff"), True, True),
    ],
)
def test_what_a_file_stores(raw, gray, deep):
    assert image_kind(raw) == ImageKind(gray, deep)


def test_a_16_bit_colour_png_is_deep():
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header, rows = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), bytes(1 + 2 * 6)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert image_kind({"__key__": "a", "png": data}) == ImageKind(gray=False, deep=True)


def test_what_is_no_image_is_refused():
    for raw in ({"__key__": "a", "txt": b"x"}, {"__key__": "a", "png": b"x"}):
        with pytest.raises(ImageError):
            image_kind(raw)

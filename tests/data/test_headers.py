from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import noise, png, saved
from PIL import Image, ImageOps, features

from latentae.data import decode, headers
from latentae.data.headers import image_size

KINDS = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", *(["AVIF"] if features.check("avif") else [])]


def made(kind: str, height: int = 40, width: int = 60, mode: str = "RGB", **options) -> bytes:
    return saved(Image.fromarray(noise(height, width, 3)).convert(mode), kind, **options)


def size(data: bytes) -> tuple[int, int] | None:
    return image_size(io.BytesIO(data).read, len(data))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_sizes_are_those_of_the_upright_image(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = made(kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
    assert size(data) == (upright.height, upright.width) == tuple(decode.decode_image(data, "x").shape[1:])


@pytest.mark.parametrize(
    "data",
    [
        made("JPEG", progressive=True),
        made("JPEG", mode="L"),
        made("JPEG", icc_profile=bytes(100_000)),  # the frame header comes after several segments
        made("PNG", mode="RGBA"),
        made("PNG", icc_profile=bytes(100_000)),
        made("WEBP", lossless=True),
        made("WEBP", mode="RGBA"),
        made("TIFF", compression="tiff_lzw"),
        made("JPEG", exif=b"Exif\0\0" + b"damaged"),
    ],
    ids=lambda data: str(len(data)),
)
def test_variants_have_their_size(data):
    assert size(data) == (40, 60)


def test_the_smallest_and_the_largest_are_measured_without_being_decoded():
    for data in (
        b"",
        b"<html>not found</html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"\xff\xd8\xff",
        b"II*\0" + bytes(9),
    ):
        assert size(data) is None
    assert size(made("PNG", 1, 1)) == (1, 1)
    assert size(made("JPEG", 1, 1)) == (1, 1)
    assert size(png(30_000, 30_000)) == (30_000, 30_000)
    assert size(png(0, 5)) is None
    assert size(png((1 << 32) - 1, 5)) is None
    turned = bytearray(
        made("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")
    )
    frame = turned.index(b"\xff\xc0")
    turned[frame + 5 : frame + 9] = struct.pack(">HH", 30_000, 20_000)
    assert size(bytes(turned)) == (20_000, 30_000)  # through PIL, which would refuse to open a bomb


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_damaged_headers_have_a_size_or_none(data):
    content = bytearray(made(data.draw(st.sampled_from(KINDS)), 8, 9))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 200)))] = data.draw(st.integers(0, 255))
    found = size(bytes(content[: data.draw(st.integers(0, len(content)))]))
    assert found is None or min(found) > 0


def test_a_header_is_enough():
    data, taken = made("JPEG", 400, 600), []

    def take(count: int) -> bytes:
        taken.append(count)
        return data[sum(taken) - count : sum(taken)]

    assert image_size(take, len(data)) == (400, 600)
    assert sum(taken) <= 4096 < len(data)
    assert headers.IMAGE_EXTENSIONS == decode.IMAGE_EXTENSIONS, (
        "decoding and measuring choose the same member"
    )

from __future__ import annotations

import io
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentae.data.decode import IMAGE_EXTENSIONS, decode_image, decode_sample, image_extension
from latentae.errors import ImageError


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_lossless_formats_give_their_pixels(rgb, kind):
    image = decode_image(saved(Image.fromarray(rgb), kind, **({"lossless": True} if kind == "WEBP" else {})), "x")
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(rgb).permute(2, 0, 1))


def test_jpeg_is_close_to_its_source():
    ramp = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], (64, 48, 3))
    image = decode_image(saved(Image.fromarray(np.ascontiguousarray(ramp)), "JPEG", quality=95), "x")
    assert image.shape == (3, 64, 48)
    assert (image.permute(1, 2, 0).int() - torch.from_numpy(ramp.copy()).int()).abs().max() <= 4


def test_grayscale_and_16_bits_become_rgb():
    gray = np.array([[0, 100], [200, 255]], dtype=np.uint8)
    for data in (
        saved(Image.fromarray(gray), "PNG"),
        saved(Image.fromarray(gray.astype(np.uint16) * 257), "PNG"),
        saved(Image.fromarray(gray), "TIFF"),
    ):
        image = decode_image(data, "x")
        assert image.shape == (3, 2, 2)
        assert all(torch.equal(channel, torch.from_numpy(gray)) for channel in image)
    assert decode_image(saved(Image.fromarray(gray > 150), "PNG"), "x")[0].tolist() == [[0, 0], [255, 255]]


def test_transparency_lies_over_white():
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    image = decode_image(saved(Image.fromarray(pixels, "RGBA"), "PNG"), "x")
    assert image[:, 0, 0].tolist() == [10, 20, 30]
    assert image[:, 0, 1].tolist() == [255, 255, 255]
    assert image[0, 0, 2].item() == pytest.approx(127, abs=1)


def test_a_palette_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    assert decode_image(saved(image, "PNG"), "x")[:, 0].T.tolist() == [[255, 0, 0], [0, 0, 255]]
    assert decode_image(saved(image, "PNG", transparency=1), "x")[:, 0].T.tolist() == [[255, 0, 0], [255, 255, 255]]


def test_cmyk_becomes_rgb():
    image = decode_image(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95), "x")
    assert image[0].min() > 240
    assert image[1:].max() < 15


def test_exif_turns_the_image_upright(rgb):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image = decode_image(saved(Image.fromarray(rgb), "PNG", exif=exif), "x")
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(np.rot90(rgb, -1).copy()))
    assert decode_image(saved(Image.new("RGB", (30, 20)), "JPEG", exif=exif), "x").shape == (3, 30, 20)


def png_of_zeros(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_200, 12_000, 60_000])  # above our limit, PIL's warning, PIL's error
def test_a_decompression_bomb_is_refused_by_its_header(side):
    with pytest.raises(ImageError, match="pixels") as caught:
        decode_image(png_of_zeros(side, side), "bomb.png")
    assert "bomb.png" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>404 not found</html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
    ],
)
def test_what_is_no_image_is_one_line_that_names_it(data):
    with pytest.raises(ImageError) as caught:
        decode_image(data, "folder/photo.jpg")
    assert "folder/photo.jpg" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_a_truncated_file_is_an_error(kind):
    data = saved(noise(64), kind)
    with pytest.raises(ImageError):
        decode_image(data[: len(data) // 2], "x")


def test_floating_point_pixels_are_refused():
    with pytest.raises(ImageError, match="range"):
        decode_image(saved(Image.new("F", (2, 2), 0.5), "TIFF"), "x")


@pytest.mark.filterwarnings("ignore")  # PIL may warn of damaged metadata
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_give_an_image_or_an_image_error(data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM"]))
    content = bytearray(saved(noise(16), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(content), "x")
    except ImageError:
        return
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3


def test_decoding_works_from_many_threads(make_png):
    data, results = make_png(1), []
    threads = [threading.Thread(target=lambda: results.append(decode_image(data, "x"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_sample_is_decoded_by_its_image_member(make_png):
    sample = decode_sample({"__key__": "a/b", "__url__": "x.tar", "txt": b"caption", "png": make_png(3)})
    assert sample.key == "a/b"
    assert sample.image.shape == (3, 12, 16)


def test_a_sample_that_fails_names_its_key_and_shard():
    with pytest.raises(ImageError, match=r"a/b in x\.tar"):
        decode_sample({"__key__": "a/b", "__url__": "x.tar", "jpg": b"<html>"})
    with pytest.raises(ImageError, match=r"a/b in x\.tar has no image: found npy, txt"):
        decode_sample({"__key__": "a/b", "__url__": "x.tar", "txt": b"", "npy": b""})


def test_the_image_member_is_chosen_by_an_allow_list():
    assert image_extension({"__key__": "a", "pkl": b"", "png": b"", "jpg": b""}) == "jpg"
    assert image_extension({"__key__": "a", "json": b""}) is None
    assert {"jpg", "png", "webp"} <= set(IMAGE_EXTENSIONS)

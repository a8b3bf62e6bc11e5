from __future__ import annotations

import io
import struct
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import noise, png, saved
from PIL import Image, features

from latentae.data import decode, pixels
from latentae.data.decode import (
    IMAGE_EXTENSIONS,
    ImageKind,
    decode_image,
    decode_sample,
    image_extension,
    image_kind,
    read_image,
)
from latentae.data.transforms import resize_and_center_crop
from latentae.errors import ImageError

HAS_AVIF = "avif" in features.modules and features.check("avif")


def photo(name: str = "astronaut.png") -> Image.Image:
    data = pytest.importorskip("skimage").data_dir
    with Image.open(Path(data) / name) as image:
        return image.convert("RGB")


@pytest.fixture
def rgb() -> np.ndarray:
    return noise(5, 7, 3)


@pytest.mark.parametrize("form", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_lossless_formats_give_their_pixels(rgb, form):
    image = decode_image(saved(rgb, form, **({"lossless": True} if form == "WEBP" else {})), "x")
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(rgb).permute(2, 0, 1))


def test_jpeg_is_close_to_its_source():
    ramp = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], (64, 48, 3))
    image = decode_image(saved(Image.fromarray(np.ascontiguousarray(ramp)), "JPEG", quality=95), "x")
    assert image.shape == (3, 64, 48)
    assert (image.permute(1, 2, 0).int() - torch.from_numpy(ramp.copy()).int()).abs().max() <= 4


def test_cmyk_becomes_rgb():
    image = decode_image(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95), "x")
    assert image[0].min() > 240
    assert image[1:].max() < 15


@pytest.mark.skipif(not HAS_AVIF, reason="this Pillow has no AVIF")
def test_avif_is_close_to_its_source():
    image = photo().resize((128, 96))
    found = decode_image(saved(image, "AVIF", quality=90), "x").permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - np.asarray(image)).mean() < 4


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", *(["AVIF"] if HAS_AVIF else [])])
def test_the_first_frame_stands_for_all(form):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    found = decode_image(data, "x")
    assert found[0].min() > 240
    assert found[1:].max() < 15


def test_the_first_of_several_pictures_in_a_jpeg():
    data = saved(
        Image.new("RGB", (8, 8), "red"),
        "MPO",
        save_all=True,
        append_images=[Image.new("RGB", (8, 8), "blue")],
    )
    assert decode_image(data, "x")[0].min() > 240


# ---- simplejpeg and Pillow


JPEGS = [
    {"subsampling": subsampling, "progressive": progressive, "quality": quality}
    for subsampling, progressive, quality in [
        (0, False, 95),
        (1, False, 90),
        (2, False, 90),
        (2, True, 75),
        (0, True, 30),
    ]
]


@pytest.fixture
def scaled(monkeypatch):
    """`scaled(data, short)`: decode at the smallest scale with a short side of `short` or more."""
    monkeypatch.setattr(decode, "LARGE", 0)
    monkeypatch.setattr(decode, "MARGIN", 1)
    return lambda data, short: decode_image(data, "x", short=short)


@pytest.mark.parametrize("size", [(64, 48), (37, 61), (1, 1), (17, 8)])
@pytest.mark.parametrize("options", JPEGS, ids=str)
def test_simplejpeg_gives_pillows_pixels(options, size, monkeypatch, scaled):
    pytest.importorskip("simplejpeg")
    for mode in ("RGB", "L", "CMYK"):
        data = saved(photo().resize(size).convert(mode), "JPEG", **options)
        fast = [decode_image(data, "x"), scaled(data, 12)]
        with monkeypatch.context() as patch:
            patch.setattr(pixels, "simplejpeg", None)
            assert torch.equal(decode_image(data, "x"), fast[0])
            assert torch.equal(scaled(data, 12), fast[1])


def test_what_simplejpeg_does_not_like_goes_to_pillow(monkeypatch):
    data = saved(photo().resize((32, 32)), "JPEG")
    expected, asked = decode_image(data, "x"), []

    def refuse(*arguments, **options):
        asked.append(arguments)
        raise ValueError("Corrupt JPEG data: bad Huffman code")

    monkeypatch.setattr(pixels, "simplejpeg", types.SimpleNamespace(decode_jpeg=refuse))
    assert torch.equal(decode_image(data, "x"), expected)
    assert len(asked) == 1
    with pytest.raises(ImageError, match="cut short"):
        decode_image(data[:-20], "x")


def test_a_large_jpeg_may_come_out_smaller_but_never_too_small(scaled):
    image = photo().resize((350, 256))
    data, png_data = saved(image, "JPEG"), saved(image)
    for short in (1, 20, 31, 32, 33, 64, 100, 250):
        factor = max(factor for factor in (1, 2, 4, 8) if 256 // factor >= short or factor == 1)
        assert scaled(data, short).shape == (3, 256 // factor, -(-350 // factor))
        assert torch.equal(scaled(png_data, short), decode_image(png_data, "x"))


@pytest.mark.parametrize(("times", "least"), [(4, 50), (2, 42), (1, 34)])
def test_the_error_of_scaled_decoding_is_what_the_documentation_says(times, least, scaled):
    data = saved(photo(), "JPEG", quality=90)
    size = 512 // 2 // times
    full, reduced = (
        resize_and_center_crop(image, size) for image in (decode_image(data, "x"), scaled(data, 256))
    )
    error = (full.float() - reduced.float()).square().mean()
    assert 0 < error < 255**2 / 10 ** (least / 10)


# ---- what is refused


@pytest.mark.parametrize("side", [9_200, 12_000, 60_000])  # above our limit, PIL's warning, PIL's error
@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF", "PPM"])
def test_a_decompression_bomb_is_refused_by_its_header(form, side):
    data = saved(Image.new("RGB", (32, 32)), form)
    if form == "PNG":
        data = png(side, side)
    elif form == "JPEG":
        at = data.find(b"\xff\xc0") + 5
        data = data[:at] + struct.pack(">HH", side, side) + data[at + 4 :]
    elif form == "BMP":
        data = data[:18] + struct.pack("<ii", side, side) + data[26:]
    elif form == "PPM":
        data = data.replace(b"32 32", b"%d %d" % (side, side))
    else:
        for tag in (256, 257):
            entry = struct.pack("<HHII", tag, 4, 1, 32)
            assert entry in data
            data = data.replace(entry, struct.pack("<HHII", tag, 4, 1, side))
    with pytest.raises(ImageError, match=r"bomb\.tga.*pixels"):
        decode_image(data, "bomb.tga")


@pytest.mark.parametrize("form", ["GIF", "ICO", "PCX", "TGA", "EPS", "PDF", "JPEG2000", "SGI"])
def test_other_formats_are_refused_whatever_their_name(form):
    with pytest.raises(ImageError, match="not an image"):
        decode_image(saved(noise(16, 16, 3), form), "photo.jpg")


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>404 not found</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"],
)
def test_what_is_no_image_is_one_line_that_names_it(data):
    with pytest.raises(ImageError, match=r"folder/photo\.jpg") as caught:
        decode_image(data, "folder/photo.jpg")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_a_truncated_file_is_an_error(form):
    data = saved(noise(64, 64, 3), form)
    with pytest.raises(ImageError):
        decode_image(data[: len(data) // 2], "x")


def test_a_tiff_of_floats_or_whose_strips_do_not_cover_it_is_no_black_image():
    with pytest.raises(ImageError, match="range"):
        decode_image(saved(Image.new("F", (2, 2), 0.5), "TIFF"), "x")
    data = saved(noise(16, 16, 3), "TIFF")
    height = struct.pack("<HHII", 257, 4, 1, 16)
    assert height in data
    with pytest.raises(ImageError, match="cover"):
        decode_image(data.replace(height, struct.pack("<HHII", 257, 4, 1, 4000)), "x")


@pytest.mark.filterwarnings("ignore")  # PIL may warn of damaged metadata
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_give_an_image_or_an_image_error(data):
    form = data.draw(
        st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", *(["AVIF"] if HAS_AVIF else [])])
    )
    channels, bits = data.draw(st.sampled_from([(3, 8), (1, 8), (4, 16)]))
    content = bytearray(saved(noise(16, 16, 3), form))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(content), "x", channels=channels, bits=bits)
    except ImageError:
        return
    assert image.dtype == {8: torch.uint8, 16: torch.uint16}[bits]
    assert image.shape[0] == channels


def test_a_sample_is_decoded_by_its_image_member(make_png):
    sample = decode_sample({"__key__": "a/b", "__url__": "x.tar", "txt": b"caption", "png": make_png(3)})
    assert sample.key == "a/b"
    assert sample.image.shape == (3, 12, 16)
    assert (
        decode_sample({"__key__": "a", "png": make_png(3)}, channels=4, bits=16).image.dtype == torch.uint16
    )
    with pytest.raises(ImageError, match=r"a/b in x\.tar"):
        decode_sample({"__key__": "a/b", "__url__": "x.tar", "jpg": b"<html>"})
    with pytest.raises(ImageError, match=r"a/b in x\.tar has no image: found npy, txt"):
        decode_sample({"__key__": "a/b", "__url__": "x.tar", "txt": b"", "npy": b""})
    assert image_extension({"__key__": "a", "pkl": b"", "png": b"", "jpg": b""}) == "jpg"
    assert image_extension({"__key__": "a", "json": b""}) is None
    assert {"jpg", "png", "webp", "avif"} <= set(IMAGE_EXTENSIONS)


def test_the_depth_of_the_file_can_be_kept(rgb, tmp_path):
    with pytest.raises(ImageError, match=r"could not read .*gone\.png: No such file"):
        read_image(tmp_path / "gone.png")
    deep = np.arange(70, dtype=np.uint16).reshape(7, 10) * 900
    for array, dtype in ((rgb, torch.uint8), (deep, torch.uint16)):
        Image.fromarray(array).save(tmp_path / "a.png")
        kept = read_image(tmp_path / "a.png", bits=None)
        assert kept.dtype == dtype
        assert torch.equal(kept, read_image(tmp_path / "a.png", bits=8 * array.dtype.itemsize))
    if HAS_AVIF:  # may have more, but only 8 can be had
        assert decode_image(saved(rgb, "AVIF"), "x", bits=None).dtype == torch.uint8


@pytest.mark.parametrize(
    ("pixels", "mode", "form", "expected"),
    [
        (noise(4, 5, 3), "RGB", "png", ImageKind(gray=False, deep=False)),
        (noise(4, 5, 3), "P", "png", ImageKind(gray=False, deep=False)),
        (noise(4, 5, 3), "RGBA", "png", ImageKind(gray=False, deep=False)),
        (noise(4, 5), "L", "png", ImageKind(gray=True, deep=False)),
        (noise(4, 5), "1", "png", ImageKind(gray=True, deep=False)),
        (noise(4, 5), "LA", "png", ImageKind(gray=True, deep=False)),
        (noise(4, 5), "L", "jpeg", ImageKind(gray=True, deep=False)),
        (noise(4, 5, dtype=np.uint16), None, "png", ImageKind(gray=True, deep=True)),
        (noise(4, 5, dtype=np.uint16), None, "tiff", ImageKind(gray=True, deep=True)),
    ],
)
def test_the_kind_of_an_image_is_what_its_file_stores(pixels, mode, form, expected):
    image = Image.fromarray(pixels)
    assert image_kind({"__key__": "a", form: saved(image.convert(mode) if mode else image, form)}) == expected


def test_a_16_bit_color_png_is_deep_and_what_is_no_image_has_no_kind():
    assert image_kind({"__key__": "a", "png": png(1, 2, bytes(1 + 2 * 6), bits=16)}) == ImageKind(
        gray=False, deep=True
    )
    for raw in ({"__key__": "a", "txt": b"x"}, {"__key__": "a", "png": b"x"}):
        with pytest.raises(ImageError):
            image_kind(raw)

"""Images above max_pixels are refused with advice; large JPEGs are decoded at a reduced scale."""

from __future__ import annotations

import inspect
import io
import struct

import click
import numpy as np
import pytest
import torch
from PIL import Image

import latentae
from latentae.cli import app
from latentae.data import decode
from latentae.data.decode import decode_image, decode_sample, image_kind, read_image
from latentae.data.headers import MAX_PIXELS
from latentae.data.loader import TrainLoader, image_batches
from latentae.data.options import DataOptions
from latentae.data.shard_files import read_shard
from latentae.data.shards import shards, write_shards
from latentae.data.transforms import augment, kept_short_side, resize_and_center_crop
from latentae.errors import ImageError

HEIGHT, WIDTH = 240, 320
VERBS = {
    "shards": shards,
    "encode": latentae.encode,
    "evaluate": latentae.evaluate,
    "reconstruct": latentae.reconstruct,
    "export": latentae.export,
    "features": latentae.features,
    "anomaly": latentae.anomaly,
    "denoise": latentae.denoise,
    "interpolate": latentae.interpolate,
    "sample": latentae.sample,
}


def photo(form: str = "JPEG", **options) -> bytes:
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(file, form, **options)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return photo(quality=95, exif=exif.tobytes())


def of_a_phone() -> bytes:
    """The header of a JPEG of 200 megapixels."""
    data = bytearray(photo())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 12240, 16320)
    return bytes(data)


@pytest.fixture
def large(monkeypatch):
    """JPEGs count as large from here on."""
    monkeypatch.setattr(decode, "LARGE", HEIGHT * WIDTH - 1)


def test_the_limit_is_an_option_and_the_error_says_so():
    message = "16320x12240 by its header, above the limit of 80000000 pixels; give --max-pixels 199756800 "
    with pytest.raises(ImageError, match=message):
        decode_image(of_a_phone(), "x")
    assert decode_image(of_a_phone(), "x", max_pixels=199_756_800, short=1).shape == (3, 1530, 2040)
    assert not image_kind({"__key__": "x", "jpg": of_a_phone()}).gray


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM"])
def test_every_format_has_the_limit(form):
    data = photo(form)
    assert decode_image(data, "x", max_pixels=HEIGHT * WIDTH).shape == (3, HEIGHT, WIDTH)
    assert decode_image(data, "x", max_pixels=None).shape == (3, HEIGHT, WIDTH)
    with pytest.raises(ImageError, match=f"above the limit of {HEIGHT * WIDTH - 1} pixels"):
        decode_image(data, "x", max_pixels=HEIGHT * WIDTH - 1)


def test_pillows_own_limit_follows_a_higher_one(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for form in ("TIFF", "WEBP", "PNG"):
        assert decode_image(photo(form), "x", max_pixels=HEIGHT * WIDTH).shape == (3, HEIGHT, WIDTH)
    assert Image.MAX_IMAGE_PIXELS == HEIGHT * WIDTH


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_that_reads_images_has_the_option(verb):
    assert (
        inspect.signature(VERBS[verb]).parameters["max_pixels"].default
        == MAX_PIXELS
        == DataOptions().max_pixels
    )
    command = app.get_command(click.Context(app), verb)
    assert "--max-pixels" in {option for parameter in command.params for option in parameter.opts}


def test_a_large_jpeg_is_decoded_at_a_reduced_scale_where_little_is_kept(large):
    sample = decode_sample({"__key__": "x", "jpg": turned()}, short=12)
    # 4 * 12 <= 60 pixels of the short side, and 1/8 would have 30.
    assert sample.image.shape == (3, WIDTH // 4, HEIGHT // 4)
    assert sample.size == (WIDTH, HEIGHT)
    full = decode_sample({"__key__": "x", "jpg": turned()})
    assert (full.image.shape, full.size) == ((3, WIDTH, HEIGHT), (WIDTH, HEIGHT))
    kept = [resize_and_center_crop(image, 12).float() for image in (sample.image, full.image)]
    assert (kept[0] - kept[1]).square().mean() < 255**2 / 10**4.5  # 45 dB


@pytest.mark.parametrize("short", [1, 12, 60, 61, None])
def test_the_margin_is_kept(large, short):
    image = decode_image(photo(), "x", short=short)
    factor = {1: 8, 12: 4, 60: 1, 61: 1, None: 1}[short]
    assert image.shape == (3, HEIGHT // factor, WIDTH // factor)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_other_formats_are_decoded_in_full(large, form):
    assert torch.equal(decode_image(photo(form), "x", short=1), decode_image(photo(form), "x"))


def test_pixels_of_other_images_are_identical(monkeypatch):
    monkeypatch.setattr(decode, "LARGE", HEIGHT * WIDTH)
    assert torch.equal(decode_image(photo(), "x", short=1), decode_image(photo(), "x"))


@pytest.mark.parametrize(
    ("options", "bucket", "short"),
    [
        ({"resolution": 16}, None, 16),
        ({"resolution": 16, "scale_min": 0.5}, None, 32),
        ({"resolution": 16, "scale_min": 0.0}, None, None),
        ({"resolution": 16, "crop": "center"}, None, 16),
        ({"resolution": 16, "crop": "random-resized"}, None, 66),
        ({"resolution": 16}, (8, 24), 24),
    ],
)
def test_a_crop_never_enlarges_what_was_reduced(options, bucket, short):
    data = DataOptions(**options)
    assert kept_short_side(data, bucket) == short
    if short is None:
        return
    marks = torch.zeros(3, 4 * short, 4 * short, dtype=torch.uint8)
    marks[:, ::2] = 255  # stripes of one pixel, of which a quarter of the size keeps nothing but gray
    for seed in range(20):
        assert augment(marks, data, seed, bucket).float().std() < 40


def test_training_has_the_same_order_and_native_crops_the_same_pixels(tmp_path, monkeypatch):
    write_shards(({"__key__": str(n), "jpg": photo(quality=80 + n)} for n in range(6)), tmp_path)
    found = {}
    for limit in (HEIGHT * WIDTH - 1, HEIGHT * WIDTH):
        monkeypatch.setattr(decode, "LARGE", limit)
        for scale in (0.0, 1.0):
            options = DataOptions(shards=str(tmp_path), validation="none", resolution=8, scale_min=scale)
            found[limit, scale] = next(iter(TrainLoader(options, 6, seed=0)))
    reduced, full = HEIGHT * WIDTH - 1, HEIGHT * WIDTH
    for scale in (0.0, 1.0):
        assert found[reduced, scale].keys == found[full, scale].keys
        assert torch.equal(found[reduced, scale].images, found[full, scale].images) == (scale == 0.0)


def test_training_and_evaluation_read_what_the_option_allows(tmp_path, monkeypatch):
    write_shards([{"__key__": "a", "jpg": photo()}, {"__key__": "b", "png": photo("PNG")}], tmp_path)
    limit = HEIGHT * WIDTH - 1
    options = DataOptions(shards=str(tmp_path), validation="none", resolution=8, max_pixels=limit)
    with pytest.raises(latentae.errors.LatentAEError, match="can't be read"):
        next(iter(TrainLoader(options, 2, seed=0)))
    with pytest.raises(ImageError, match=f"limit of {limit} pixels"):
        list(image_batches([str(tmp_path / "000000.tar")], 8, 2, max_pixels=limit))
    (tmp_path / "a.jpg").write_bytes(photo())
    with pytest.raises(ImageError, match=f"limit of {limit} pixels"):
        read_image(tmp_path / "a.jpg", max_pixels=limit)


@pytest.mark.parametrize("resize", [None, 16])
def test_shards_stop_at_a_large_image_and_resume_with_the_option(tmp_path, resize):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(photo())
    with pytest.raises(ImageError, match="--max-pixels 76800"):
        shards(tmp_path / "images", tmp_path / "out", resize=resize, max_pixels=1000)
    index = shards(tmp_path / "images", tmp_path / "out", resize=resize, max_pixels=HEIGHT * WIDTH)
    (sample,) = read_shard(index.shards[0].path)
    assert (sample.get("jpg") == photo()) == (resize is None)

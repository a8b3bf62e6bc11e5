"""JPEG and WebP as methods: files match Pillow's, stay within their budgets and use them up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFile
from pillow_files import channels_of, pillow_file, pillow_pixels

from latentae.errors import ImageError
from latentae.evaluation.methods import codecs
from latentae.evaluation.methods.codecs import ImageCodec, Jpeg, WebP
from latentae.evaluation.methods.method import Method

CODED = [(Jpeg(), 1), (Jpeg(), 3), (WebP(), 1), (WebP(), 3), (WebP(), 4)]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(CODED), st.integers(0, 6000), st.integers(0, 5))
def test_a_file_is_never_above_its_budget_and_decodes_to_what_it_says(
    smooth_images, coded: tuple[ImageCodec, int], budget: int, seed: int
):
    codec, channels = coded
    image = channels_of(smooth_images(1, 32, seed), channels)[0]
    found = codec.within(image, budget)
    if found is None:
        assert all(
            len(codec.encode(image, codec.qualities[0], variant)) > budget
            for variant in codec.variants(channels)
        )
        return
    assert len(found.data) <= budget
    assert found.data == codec.encode(image, found.quality, found.variant)
    assert found.image.shape == image.shape
    assert torch.equal(found.image, pillow_pixels(found.data, channels))
    if found.quality < codec.qualities[-1]:
        assert len(codec.encode(image, found.quality + 1, found.variant)) > budget


@pytest.mark.parametrize(("codec", "channels"), CODED)
def test_of_all_variants_the_nearest_to_the_image_is_taken(smooth_images, codec: ImageCodec, channels: int):
    for image in channels_of(smooth_images(3, 48), channels):
        best = codec.within(image, 1500)
        assert best is not None
        error = (best.image.double() - image.double()).square().mean()
        for variant in codec.variants(channels):
            fitting = [q for q in codec.qualities if len(codec.encode(image, q, variant)) <= 1500]
            if fitting:
                other = codec.decode(codec.encode(image, fitting[-1], variant), channels)
                assert error <= 1.02 * (other.double() - image.double()).square().mean() + 1e-9


@pytest.mark.parametrize(("codec", "channels"), CODED)
def test_as_a_method_each_image_has_its_own_budget(smooth_images, codec: ImageCodec, channels: int):
    method: Method = codec
    images = channels_of(smooth_images(4, 32), channels).contiguous(memory_format=torch.channels_last)
    made = method(images, [900, 10, 100_000, 1500])
    assert (made.images.shape, made.images.dtype, made.missing) == (images.shape, torch.uint8, {1})
    assert all(math.isnan(made.numbers[name][1]) for name in ("bytes", "quality"))
    assert made.numbers["quality"][2] == 100
    for row, budget in ((0, 900), (2, 100_000), (3, 1500)):
        alone = codec.within(images[row], budget)
        assert alone is not None
        assert torch.equal(made.images[row], alone.image)
        assert (made.numbers["bytes"][row], made.numbers["quality"][row]) == (len(alone.data), alone.quality)
    assert codec(images[:0], []).images.shape == (0, channels, 32, 32)


@pytest.mark.parametrize(("codec", "channels"), [(Jpeg(), 4), (Jpeg(), 2), (WebP(), 2)])
def test_images_it_does_not_have_are_refused_with_the_reason(codec: ImageCodec, channels: int):
    reason = codec.refuses(channels)
    assert codec.format in reason
    with pytest.raises(ImageError) as raised:
        codec(torch.zeros(1, channels, 16, 16, dtype=torch.uint8), [500])
    assert str(raised.value) == reason
    assert not any(codec.refuses(fine) for other, fine in CODED if other.name == codec.name)


@pytest.mark.parametrize("quality", [1, 50, 94, 100])
def test_jpeg_files_are_pillows(smooth_images, quality: int):
    image = smooth_images(1, 40)[0]
    for variant, subsampling in (("4:4:4", 0), ("4:2:0", 2)):
        theirs = pillow_file(image, "JPEG", quality=quality, subsampling=subsampling, optimize=True)
        assert Jpeg().encode(image, quality, variant) == theirs
    gray = image[:1]
    assert Jpeg().encode(gray, quality, "") == pillow_file(gray, "JPEG", quality=quality, optimize=True)
    assert Jpeg().variants(1) == ("",)


def test_noise_takes_more_bytes_than_pillow_makes_room_for(capfd):
    noise = torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8)
    room = ImageFile.MAXBLOCK
    file = Jpeg().encode(noise, 100, "4:4:4")
    assert len(file) > max(2 * 256 * 256, room)  # the buffer that Pillow reserves for optimized tables
    assert room == ImageFile.MAXBLOCK
    assert (Jpeg().decode(file, 3).int() - noise.int()).abs().max() <= 4
    found = Jpeg().within(noise, 2**20)
    assert found is not None
    assert (found.quality, found.variant) == (100, "4:4:4")
    assert not capfd.readouterr().err


def test_subsampling_is_chosen_by_what_is_in_the_image(smooth_images):
    colors = torch.zeros(3, 64, 64, dtype=torch.uint8)  # red and blue stripes: all of it is chroma
    colors[0, :, ::2] = 255
    colors[2, :, 1::2] = 255
    found = Jpeg().within(colors, 3000)
    assert found is not None
    assert found.variant == "4:4:4"
    photo = smooth_images(1, 64)[0]
    tight = Jpeg().within(photo, len(Jpeg().encode(photo, 20, "4:2:0")))
    assert tight is not None
    assert tight.variant == "4:2:0"


@pytest.mark.parametrize("quality", [0, 50, 100])
def test_webp_files_are_pillows(smooth_images, quality: int):
    rgb = smooth_images(1, 40)
    gray, clear = channels_of(rgb, 1)[0], channels_of(rgb, 4)[0]
    assert WebP().encode(rgb[0], quality, "") == pillow_file(
        rgb[0], "WEBP", quality=quality, method=4, exact=True
    )
    assert WebP().encode(gray, quality, "") == pillow_file(
        gray, "WEBP", mode="RGB", quality=quality, method=4, exact=True
    )
    for variant, alpha in (("exact alpha", 100), ("lossy alpha", quality)):
        theirs = pillow_file(clear, "WEBP", quality=quality, method=4, exact=True, alpha_quality=alpha)
        assert WebP().encode(clear, quality, variant) == theirs


def test_gray_stays_gray_and_alpha_exact_where_it_says_so(smooth_images):
    codec, rgb = WebP(), smooth_images(1, 48)
    gray = channels_of(rgb, 1)[0]
    restored = codec.decode(codec.encode(gray, 100, ""), 1)
    assert restored.shape == gray.shape
    assert (restored.int() - gray.int()).abs().max() <= 6  # WebP's luma has 220 levels
    clear = channels_of(rgb, 4)[0]
    assert torch.equal(codec.decode(codec.encode(clear, 10, "exact alpha"), 4)[3], clear[3])
    assert len(codec.encode(clear, 10, "lossy alpha")) < len(codec.encode(clear, 10, "exact alpha"))


def test_colors_under_transparent_pixels_are_kept(smooth_images):
    image = torch.cat([smooth_images(1, 32)[0], torch.zeros(1, 32, 32, dtype=torch.uint8)])
    restored = WebP().decode(WebP().encode(image, 100, "exact alpha"), 4)
    opaque = WebP().decode(WebP().encode(image[:3], 100, ""), 3)
    assert torch.equal(restored[:3], opaque)
    opaque = torch.cat([image[:3], torch.full((1, 32, 32), 255, dtype=torch.uint8)])
    assert torch.equal(
        WebP().decode(WebP().encode(opaque, 50, "exact alpha"), 4)[3], opaque[3]
    )  # the file then has no alpha


def test_a_pillow_without_webp_says_so(monkeypatch):
    monkeypatch.setattr(codecs.features, "check", lambda name: False)
    assert "built without WebP" in WebP().refuses(3)

"""What JPEG and WebP have in common as methods: budgets are kept and used up, and what is reported is what the file holds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pillow_files import channels_of, pillow_pixels

from latentae.errors import ImageError
from latentae.evaluation.methods.base import Method
from latentae.evaluation.methods.codec import ImageCodec
from latentae.evaluation.methods.jpeg import Jpeg
from latentae.evaluation.methods.webp import WebP

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

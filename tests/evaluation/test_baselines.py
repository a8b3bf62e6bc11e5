from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentae.errors import ModelError
from latentae.evaluation.baselines import compress_latent, decompress_latent, jpeg_within


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 6000), st.integers(0, 5))
def test_jpeg_is_never_above_its_budget_and_decodes_to_what_it_says(smooth_images, budget: int, seed: int):
    image = smooth_images(1, 32, seed)[0]
    found = jpeg_within(image, budget)
    if found is None:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(buffer, "JPEG", quality=1, subsampling=2)
        assert budget < buffer.tell()
        return
    assert len(found.data) <= budget
    with Image.open(io.BytesIO(found.data)) as picture:
        assert np.array_equal(np.array(picture), found.image.permute(1, 2, 0).numpy())


def test_jpeg_uses_its_budget_up(smooth_images):
    image = smooth_images(1, 64)[0]
    found = jpeg_within(image, 2500)
    assert found is not None
    buffer = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    picture.save(buffer, "JPEG", quality=found.quality + 1, subsampling=found.subsampling, optimize=True)
    assert len(found.data) <= 2500 < buffer.tell()


@settings(max_examples=40, deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(0, 1e4), st.integers(1, 5), st.integers(1, 9))
def test_quantised_latent_is_within_half_a_step(mean: float, spread: float, channels: int, side: int):
    latent = mean + spread * torch.randn(channels, side, side + 1, generator=torch.Generator().manual_seed(0))
    decoded = decompress_latent(compress_latent(latent), latent.shape)
    step = (latent.amax((1, 2), keepdim=True) - latent.amin((1, 2), keepdim=True)) / 255
    assert decoded.shape == latent.shape
    assert ((decoded - latent).abs() <= step / 2 + 1e-6 * (abs(mean) + spread + 1)).all()


def test_bytes_of_a_latent_are_those_of_codes_and_ranges():
    noise = torch.rand(4, 32, 32)  # 4096 codes of nearly 8 bits each
    assert 4096 * 0.95 < len(compress_latent(noise)) < 4096 + 4 * 8 + 64
    constant = torch.full((4, 32, 32), 1.25)
    assert len(compress_latent(constant)) < 100
    assert torch.equal(decompress_latent(compress_latent(constant), constant.shape), constant)


def test_a_latent_with_nan_is_refused():
    with pytest.raises(ModelError, match="NaN"):
        compress_latent(torch.full((2, 4, 4), torch.nan))

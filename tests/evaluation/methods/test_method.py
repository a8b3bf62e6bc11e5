"""Latents in few bits: compared with numpy, with the error and bytes of the format."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentae.errors import ModelError, RecipeError
from latentae.evaluation.methods.method import compress_latent, decompress_latent, quantize


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(0, 1e4), st.integers(1, 5), st.integers(1, 9), st.integers(2, 8))
def test_a_quantized_latent_is_within_half_a_step(
    mean: float, spread: float, channels: int, side: int, bits: int
):
    latent = mean + spread * torch.randn(channels, side, side + 1, generator=torch.Generator().manual_seed(0))
    decoded = decompress_latent(compress_latent(latent, bits), latent.shape)
    step = (latent.amax((1, 2), keepdim=True) - latent.amin((1, 2), keepdim=True)) / (2**bits - 1)
    assert decoded.shape == latent.shape
    assert decoded.dtype == torch.float32
    assert ((decoded - latent).abs() <= step / 2 + 1e-6 * (abs(mean) + spread + 1)).all()
    assert all(len(channel.unique()) <= 2**bits for channel in decoded)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_the_stream_is_ranges_and_deflated_codes_as_written(bits: int):
    latent = torch.randn(3, 6, 7)
    stream = compress_latent(latent, bits)
    levels, values = 2**bits - 1, latent.double().flatten(1).numpy()
    low, high = values.min(1), values.max(1)
    header = np.frombuffer(stream[:24], dtype="<f4").reshape(3, 2)
    assert header[:, 0] == pytest.approx(low, rel=1e-7)
    assert header[:, 1] == pytest.approx((high - low) / levels, rel=1e-6)
    codes = np.frombuffer(zlib.decompress(stream[24:]), dtype=np.uint8).reshape(3, -1)
    assert np.abs(codes - (values - low[:, None]) / (high - low)[:, None] * levels).max() < 0.5 + 1e-4
    assert compress_latent(latent) == compress_latent(latent, 8)


def test_bytes_of_a_latent_are_those_of_codes_and_ranges():
    noise = torch.rand(4, 64, 64)  # 16,384 codes of nearly 8 bits each
    assert 16384 * 0.95 < len(compress_latent(noise)) < 16384 + 4 * 8 + 64
    for bits in (
        2,
        3,
        4,
        5,
        6,
    ):  # codes equally likely, but for the two at the ends: no coder can do better than the bits
        assert 0.9 < 8 * (len(compress_latent(noise, bits)) - 32) / noise.numel() / bits < 1.15
    constant = torch.full((4, 32, 32), 1.25)
    assert len(compress_latent(constant)) < 100
    assert torch.equal(decompress_latent(compress_latent(constant), constant.shape), constant)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 4), st.integers(2, 8), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_a_batch_is_quantized_image_by_image(count: int, bits: int, dtype: torch.dtype):
    latents = torch.randn(count, 3, 4, 5).to(dtype)
    restored, sizes = quantize(latents, bits)
    assert restored.dtype == dtype
    assert restored.shape == latents.shape
    for latent, found, size in zip(latents, restored, sizes, strict=True):
        stream = compress_latent(latent, bits)
        assert size == len(stream)
        assert torch.equal(found, decompress_latent(stream, latent.shape).to(dtype))


def test_a_latent_with_nan_and_bits_out_of_range_are_refused():
    for value in (torch.nan, torch.inf):
        with pytest.raises(ModelError, match="NaN"):
            compress_latent(torch.full((2, 4, 4), value))
    for bits in (1, 9):
        with pytest.raises(RecipeError, match=f"bits is {bits}; .* 2 to 8"):
            quantize(torch.zeros(1, 2, 4, 4), bits)

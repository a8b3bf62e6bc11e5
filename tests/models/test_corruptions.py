from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from latentae.errors import ImageError, ModelError
from latentae.models.corruptions import (
    add_latent_noise,
    add_noise,
    blur,
    detok_ratio,
    fill_masked,
    keep_channels,
    mask_latent,
    mix_noise,
    nested_count,
    patch_mask,
)


@pytest.mark.parametrize("add", [add_noise, add_latent_noise])
def test_noise_of_each_sample_has_the_spread_asked_for(add):
    x, noise = torch.rand(3, 3, 64, 64), torch.randn(3, 3, 64, 64)
    std = torch.tensor([0.0, 0.5, 2.0])
    found = (add(x, noise, std) - x).flatten(1).std(dim=1)
    torch.testing.assert_close(found, std * noise.flatten(1).std(dim=1), rtol=1e-4, atol=1e-6)
    assert torch.equal(add(x, noise, std)[0], x[0])
    assert add(x.bfloat16(), noise, std).dtype == torch.bfloat16


def test_mixed_noise_goes_from_the_latent_to_the_noise():
    z, noise = torch.randn(3, 4, 2, 2), 3 * torch.randn(3, 4, 2, 2)
    mixed = mix_noise(z, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(mixed[0], z[0])
    torch.testing.assert_close(mixed[1], 0.75 * z[1] + 0.25 * noise[1])
    assert torch.equal(mixed[2], noise[2])


@pytest.mark.parametrize("size", [(17, 24), (5, 3), (1, 9)])
def test_blur_is_a_gaussian_filter_with_reflection(size):
    x, sigma = torch.randn(3, 2, *size, dtype=torch.float64), torch.tensor([0.4, 1.3, 3.0])
    blurred = blur(x, sigma)
    for image, s, found in zip(x.numpy(), sigma.tolist(), blurred.numpy(), strict=True):
        expected = gaussian_filter(image, s, mode="mirror", axes=(1, 2), radius=int(np.ceil(4 * s)))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_blur_leaves_sharp_samples_alone_and_does_not_depend_on_the_batch():
    x = torch.randn(3, 3, 16, 16)
    sigma = torch.tensor([0.0, 0.7, 2.5])
    together = blur(x, sigma)
    assert torch.equal(together[0], x[0])
    torch.testing.assert_close(together[1:2], blur(x[1:2], sigma[1:2]), rtol=0, atol=1e-6)
    constant = torch.full((1, 1, 8, 8), 0.5)
    torch.testing.assert_close(blur(constant, sigma[2:]), constant)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), columns=st.integers(1, 9), ratio=st.floats(0, 1))
def test_the_mask_hides_exactly_the_share_asked_for(seed, rows, columns, ratio):
    uniform = torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = patch_mask(uniform, torch.tensor([ratio, 0.0], dtype=torch.float64))
    assert mask.shape == (2, 1, rows, columns)
    assert mask.dtype == torch.bool
    assert mask[0].sum() == round(ratio * (rows * columns))
    assert not mask[1].any()
    hidden, seen = uniform[0][mask[0, 0]], uniform[0][~mask[0, 0]]
    assert not len(hidden) or not len(seen) or hidden.max() <= seen.min()
    assert patch_mask(torch.zeros(1, 4, 4), torch.tensor([0.5])).sum() == 8


def test_the_fill_covers_hidden_patches_and_learns_from_them_only():
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    mask = torch.zeros(2, 1, 2, 3, dtype=torch.bool)
    mask[0, 0, 1, 2] = True
    fill = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    filled = fill_masked(images, mask, fill)
    assert torch.equal(filled[0, :, 4:, 8:], fill.detach().view(3, 1, 1).expand(3, 4, 4))
    assert torch.equal(filled[1], images[1])
    assert torch.equal(filled[0, :, :4], images[0, :, :4])
    filled.sum().backward()
    assert torch.equal(
        fill.grad, torch.full((3,), 16.0, dtype=torch.float64)
    )  # pixels of the one hidden patch


def test_a_patch_fills_each_hidden_patch_in_its_own_place_and_a_colour_patches_of_unequal_size():
    patch = torch.randn(3, 4, 4, requires_grad=True)
    mask = torch.tensor([[True, False], [False, True]]).view(1, 1, 2, 2)
    filled = fill_masked(torch.zeros(1, 3, 8, 8), mask, patch)
    assert torch.equal(filled[0, :, :4, :4], patch.detach())
    assert torch.equal(filled[0, :, 4:, 4:], patch.detach())
    assert not filled[0, :, :4, 4:].any()
    filled.sum().backward()
    assert torch.equal(patch.grad, torch.full_like(patch, 2.0))
    with pytest.raises(ImageError, match="9 x 8, expected 2 x 2 patches of 4 x 4"):
        fill_masked(torch.zeros(1, 3, 9, 8), mask, patch)
    filled = fill_masked(
        torch.zeros(1, 1, 5, 4), torch.tensor([[True], [False]]).view(1, 1, 2, 1), torch.ones(1)
    )
    assert filled[0, 0, :, 0].tolist() == [1, 1, 1, 0, 0]


def test_latent_places_are_replaced_and_the_fill_learns():
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    mask = patch_mask(torch.rand(2, 3, 3), torch.tensor([0.4, 1.0]))
    fill = torch.randn(4, requires_grad=True)
    masked = mask_latent(z, mask, fill)
    assert torch.equal(masked[1], fill.detach().view(4, 1, 1).expand(4, 3, 3))
    masked.sum().backward()
    assert torch.equal(z.grad[:, :1] == 0, mask)
    assert torch.equal(fill.grad, torch.full((4,), float(mask.sum())))


def test_detok_leaves_an_eighth_of_the_samples_whole():
    ratio = detok_ratio(torch.arange(8000) / 8000)
    assert ratio.min() == 0
    assert ratio.max() < 0.7
    assert (ratio == 0).double().mean() == pytest.approx(0.125, abs=1e-3)
    assert ratio.double().mean() == pytest.approx(0.7**2 / 2 / 0.8, abs=1e-3)
    assert detok_ratio(torch.tensor([1.0]), highest=0.9).item() == pytest.approx(0.9)


def test_kept_channels_stay_and_the_rest_is_zero_whatever_it_held():
    z = torch.randn(2, 6, 3, 3).to(memory_format=torch.channels_last)
    z[:, 5] = float("inf")
    kept = keep_channels(z, 4)
    assert torch.equal(kept[:, :4], z[:, :4])
    assert not kept[:, 4:].any()
    assert torch.equal(keep_channels(z, 6), z)
    for count in (0, 7):
        with pytest.raises(ModelError, match=f"count is {count}, expected 1 to 6"):
            keep_channels(z, count)


@pytest.mark.parametrize(
    ("channels", "step", "fewest", "expected"),
    [
        (16, 4, None, [4, 8, 12, 16]),
        (32, 4, 16, [16, 20, 24, 28, 32]),
        (10, 4, None, [4, 8, 10]),
        (4, 4, None, [4]),
    ],
)
def test_nested_counts_are_equally_likely_and_reach_all_channels(channels, step, fewest, expected):
    counts = [nested_count(i / 1000, channels, step, fewest) for i in range(1000)]
    found, times = np.unique(counts, return_counts=True)
    assert found.tolist() == expected
    assert times.max() - times.min() <= 1
    with pytest.raises(ModelError, match=f"step is {channels + 1}"):
        nested_count(0.5, channels, channels + 1)
    with pytest.raises(ModelError, match="fewest 0"):
        nested_count(0.5, 4, 1, 0)

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from latentae.measures.latents.report import LatentReport
from latentae.measures.latents.spectrum import MOST_BANDS, power_sums, radial_bands
from latentae.models.base import DiagonalGaussian


def spectrum_of(latents, images):
    report = LatentReport()
    report.add(DiagonalGaussian(torch.cat([latents, torch.full_like(latents, -30.0)], 1)), images)
    return report.result()["spectrum"]


def plain(maps: np.ndarray) -> tuple[list[float], float]:
    """[N, C, s, s] -> spectrum and share above 1/4 cycle per pixel, by plain loops."""
    side = maps.shape[-1]
    bands = min(16, side)
    highest = math.hypot(side - 1, side - 1)
    sums, counts, high, total = [0.0] * bands, [0] * bands, 0.0, 0.0
    for image in maps.reshape(-1, side, side):
        power = dctn(image, norm="ortho") ** 2
        for i in range(side):
            for j in range(side):
                if i or j:
                    band = min(int(math.hypot(i, j) / highest * bands + 1e-9), bands - 1)
                    sums[band] += power[i, j]
                    counts[band] += 1
                    high += power[i, j] * (math.hypot(i, j) / (2 * side) > 0.25 + 1e-9)
                    total += power[i, j]
    means = np.array(sums) / counts
    return (means / means.sum()).tolist(), high / total


@pytest.mark.parametrize("side", [4, 7, 16])
def test_equals_a_plain_computation(side):
    latents = torch.randn(5, 3, side, side, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1]).view(
        3, 1, 1
    )
    images = torch.rand(5, 3, 8 * side, 8 * side, dtype=torch.float64)
    found = spectrum_of(latents, images)
    standard = latents / latents.transpose(0, 1).flatten(1).std(1, correction=0).view(3, 1, 1)
    small = images.numpy().reshape(5, 3, side, 8, side, 8).mean((3, 5))
    for name, maps in (("latent", standard.numpy()), ("image", small)):
        expected, share = plain(maps)
        np.testing.assert_allclose(found[name], expected, rtol=1e-9)
        assert sum(found[name]) == pytest.approx(1)
        assert found["high_frequency_share"][name] == pytest.approx(share, rel=1e-9)
    assert found["frequency"] == sorted(found["frequency"])


@pytest.mark.parametrize("size", [(4, 4), (4, 64), (5, 9), (32, 32), (100, 40)])
def test_no_band_is_empty_and_each_frequency_but_zero_has_one(size):
    membership, frequency, high = radial_bands(*size)
    assert membership.shape == (size[0] * size[1], min(MOST_BANDS, *size))
    assert (membership.sum(0) > 0).all()
    assert membership[0].sum() == 0
    assert (membership[1:].sum(1) == 1).all()
    assert (np.diff(frequency) > 0).all()
    assert 0 < high.mean() < 1


@pytest.mark.parametrize("cycles", [1, 5, 12])
def test_a_cosine_is_one_line_at_its_frequency(cycles):
    x = torch.arange(32, dtype=torch.float64)
    wave = torch.cos(math.pi / 32 * (x + 0.5) * cycles).expand(1, 1, 32, 32)
    found = spectrum_of(wave, torch.rand(1, 1, 32, 32))
    band = int(np.argmax(found["latent"]))
    assert found["latent"][band] == pytest.approx(1)
    assert abs(found["frequency"][band] - cycles / 64) < 0.03


def test_a_channel_that_never_varies_is_left_out():
    latents, images = torch.randn(3, 2, 8, 8), torch.rand(3, 3, 16, 16)
    dead = torch.cat([latents, torch.full((3, 1, 8, 8), 0.3)], 1)
    np.testing.assert_allclose(
        spectrum_of(dead, images)["latent"], spectrum_of(latents, images)["latent"], rtol=1e-12
    )


def test_small_latents_and_flat_images_have_none():
    assert spectrum_of(torch.randn(2, 3, 3, 8), torch.rand(2, 3, 24, 64)) is None
    assert spectrum_of(torch.randn(2, 3, 8, 8), torch.full((2, 3, 64, 64), 0.1)) is None
    per_image = torch.randn(4, 3, 1, 1).expand(4, 3, 8, 8)
    assert spectrum_of(per_image, torch.rand(4, 3, 64, 64)) is None


def test_power_adds_up_to_the_variance_within_images():
    latent, image = torch.randn(3, 8, 8, dtype=torch.float64), torch.rand(3, 64, 64, dtype=torch.float64)
    of_latent, _ = power_sums(latent, image)
    np.testing.assert_allclose(of_latent[:, -1], 64 * latent.flatten(1).var(1, correction=0), rtol=1e-12)

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from latentae.errors import ImageError
from latentae.measures.metrics import bootstrap_mean, psnr, ssim


def pair(size: int = 40, sigma: float = 12.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (3, 3, size, size + 6), generator=generator).float()
    image = torch.nn.functional.avg_pool2d(image, 5, stride=1, padding=2)
    noisy = image + sigma * torch.randn(image.shape, generator=generator)
    return image.round().to(torch.uint8), noisy.round().clamp(0, 255).to(torch.uint8)


def test_psnr_of_identical_images_is_infinite_and_of_inverted_ones_exact():
    image = torch.randint(0, 2, (2, 3, 16, 16), dtype=torch.uint8) * 255
    assert torch.isinf(psnr(image, image)).all()
    assert psnr(255 - image, image).tolist() == [0.0, 0.0]
    assert ssim(image, image).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    assert (ssim(255 - image, image) < -0.5).all()


@pytest.mark.parametrize("sigma", [4.0, 16.0])
def test_psnr_of_noise_of_known_sigma_and_of_a_constant_shift(sigma: float):
    image = torch.full((1, 3, 256, 256), 128, dtype=torch.uint8)
    assert psnr(image + int(sigma), image).item() == pytest.approx(20 * math.log10(255 / sigma), abs=1e-12)
    noisy = (image + sigma * torch.randn(image.shape)).round().clamp(0, 255).to(torch.uint8)
    # rounding to integers adds a variance of 1/12; four standard errors of the variance of 196,608
    # numbers are 0.06 dB
    assert psnr(noisy, image).item() == pytest.approx(10 * math.log10(255**2 / (sigma**2 + 1 / 12)), abs=0.06)


def test_both_agree_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = pair()
    for index in range(len(a)):
        x, y = a[index].permute(1, 2, 0).numpy(), b[index].permute(1, 2, 0).numpy()
        assert psnr(a, b)[index].item() == pytest.approx(
            metrics.peak_signal_noise_ratio(x, y, data_range=255), abs=1e-9
        )
        expected = metrics.structural_similarity(
            x,
            y,
            channel_axis=2,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert ssim(a, b)[index].item() == pytest.approx(expected, abs=1e-4)


def test_small_images_floats_and_unequal_shapes_are_refused():
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(ImageError, match="at least 11"):
        ssim(image[..., :8], image[..., :8])
    with pytest.raises(ImageError, match="to_uint8"):
        psnr(image.float(), image)
    with pytest.raises(ImageError, match="two equal"):
        psnr(image, image[..., :8])


@settings(max_examples=25, deadline=None)
@given(arrays(np.uint8, (2, 3, 12, 13)))
def test_metrics_are_symmetric_and_bounded(values: np.ndarray):
    a, b = torch.from_numpy(values[:1]), torch.from_numpy(values[1:])
    assert psnr(a, b).item() == psnr(b, a).item() >= 0
    assert ssim(a, b).item() == pytest.approx(ssim(b, a).item(), abs=1e-12)
    assert -1 <= ssim(a, b).item() <= 1 + 1e-12


def test_interval_is_seeded_covers_the_mean_and_shrinks():
    values = np.random.default_rng(0).normal(25, 3, 400)
    small, large = bootstrap_mean(values[:40], seed=1), bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) == large != bootstrap_mean(values, seed=2)
    assert None not in (large.low, large.mean, large.high, small.low, small.high)
    assert large.low < large.mean < large.high
    assert large.high - large.low < small.high - small.low
    # the bootstrap of a mean has nearly the normal interval, 1.96 s / sqrt(n) either side
    assert (large.high - large.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)


def test_infinite_values_are_counted_and_not_averaged_and_one_value_is_its_interval():
    interval = bootstrap_mean([20.0, math.inf, 30.0, math.nan])
    assert (interval.mean, interval.n, interval.infinite) == (25.0, 2, 1)
    one = bootstrap_mean([0.1], resamples=10)
    assert one.mean == one.low == one.high == 0.1
    empty = bootstrap_mean([math.inf])
    assert (empty.mean, empty.low, empty.high, empty.n, empty.infinite) == (None, None, None, 0, 1)

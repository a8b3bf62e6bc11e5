from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn

from latentae.losses.spectrum import dct2, radial_log_spectrum, spectrum_matching


def numpy_spectrum(x: np.ndarray, bins: int, delta: float = 0.0) -> np.ndarray:
    """The authors' algorithm for square inputs, one image and one band at a time."""
    size = x.shape[-1]
    rows = []
    for image in x:
        power = (dctn(image, norm="ortho", axes=(1, 2)) ** 2).mean(axis=0)
        power[0, 0] = 0.0
        i, j = np.indices((size, size))
        band = np.minimum(np.floor(np.hypot(i, j) / np.hypot(size - 1, size - 1) * bins), bins - 1)
        mean = [power[band == k].mean() if (band == k).any() else 0.0 for k in range(bins)]
        level = np.log1p(np.array(mean) * np.arange(1, bins + 1) ** delta)
        rows.append(level / level.sum())
    return np.array(rows)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (8, 5), (32, 32)])
def test_dct_is_orthonormal_and_scipys(shape):
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    np.testing.assert_allclose(
        dct2(x).numpy(), dctn(x.numpy(), norm="ortho", axes=(2, 3)), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(dct2(x).square().sum(), x.square().sum())


@pytest.mark.parametrize(("size", "bins", "delta"), [(32, 16, 0.0), (32, 16, 1.0), (8, 4, 0.4), (6, 16, 0.0)])
def test_equals_the_plain_algorithm_on_square_latents(size, bins, delta):
    x, z = (
        torch.randn(2, 3, size, size, dtype=torch.float64),
        torch.randn(2, 5, size, size, dtype=torch.float64) ** 3,
    )
    p, q = numpy_spectrum(x.numpy(), bins, delta), numpy_spectrum(z.numpy(), bins)
    np.testing.assert_allclose(radial_log_spectrum(x, bins, delta).numpy(), p, rtol=1e-6, atol=1e-9)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.where(p > 0, p * np.log(p / q), 0.0).sum(axis=1)
    found = spectrum_matching(z, x, bins=bins, flattening=delta)  # of one size: the image is not shrunk
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [(4, 4), (1, 1), (3, 11), (16, 8)])
def test_any_size_and_a_constant_latent_give_a_finite_value_and_gradient(size):
    z = torch.randn(2, 4, *size, requires_grad=True)
    value = spectrum_matching(z, torch.rand(2, 3, 8 * size[0], 8 * size[1]))
    assert value.shape == (2,)
    assert torch.isfinite(value).all()
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert torch.isfinite(gradient).all()
    assert size == (1, 1) or gradient.abs().max() > 0
    constant = torch.ones(1, 4, 8, 8, requires_grad=True)
    value = spectrum_matching(constant, torch.randn(1, 3, 64, 64))
    value.sum().backward()
    assert 1 < value.item() < 100
    assert torch.isfinite(constant.grad).all()


def smooth(noise: torch.Tensor) -> torch.Tensor:
    return F.interpolate(F.avg_pool2d(noise, 8), size=noise.shape[-2:], mode="bicubic") * 8


def test_zero_where_spectra_agree_and_larger_for_a_noisier_latent():
    image = smooth(torch.randn(1, 3, 256, 256))
    shrunk = F.interpolate(image, size=(32, 32), mode="bicubic", antialias=True)
    same = spectrum_matching(shrunk, image)
    some, much = (spectrum_matching(shrunk + s * torch.randn_like(shrunk), image) for s in (0.3, 3.0))
    assert same.abs().item() < 1e-6
    assert same < some < much
    # channels, their order and a shift of the mean don't matter
    torch.testing.assert_close(spectrum_matching(shrunk.flip(1) + 5, image), same, rtol=0, atol=1e-5)


def test_its_gradient_takes_noise_out_of_a_latent():
    """A step along it changes the loss as a central difference says."""
    image, step = smooth(torch.randn(2, 3, 64, 64, dtype=torch.float64)), 1e-5
    z = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(spectrum_matching(z, image).sum(), z)
    direction = -gradient / gradient.norm()
    ahead, behind = (spectrum_matching(z.detach() + s * direction, image).sum() for s in (step, -step))
    slope = (ahead - behind) / (2 * step)
    assert slope < 0
    torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-3, atol=0)


def test_half_precision_and_frozen_images():
    z = torch.randn(1, 4, 8, 8)
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    torch.testing.assert_close(
        spectrum_matching(z.bfloat16(), x), spectrum_matching(z, x), rtol=0.02, atol=1e-3
    )
    assert not spectrum_matching(z, x).requires_grad

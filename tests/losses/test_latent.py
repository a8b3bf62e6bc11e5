from __future__ import annotations

import torch
from torch.distributions import Normal, kl_divergence

from latentae.losses.latent import kl_per_element
from latentae.models.posterior import DiagonalGaussian


def test_kl_is_the_closed_form_over_image_elements():
    moments = torch.randn(3, 8, 2, 5, dtype=torch.float64)
    posterior = DiagonalGaussian(moments)
    images = torch.zeros(3, 3, 16, 40)
    expected = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum(dim=(1, 2, 3)) / (3 * 16 * 40)
    torch.testing.assert_close(kl_per_element(posterior, images), expected, rtol=1e-12, atol=0)


def test_the_ratio_to_the_pixel_loss_does_not_depend_on_the_resolution():
    small, large = torch.randn(1, 8, 4, 4), None
    large = small.repeat(1, 1, 2, 2)
    a = kl_per_element(DiagonalGaussian(small), torch.zeros(1, 3, 32, 32))
    b = kl_per_element(DiagonalGaussian(large), torch.zeros(1, 3, 64, 64))
    torch.testing.assert_close(a, b)


def test_a_standard_normal_posterior_costs_nothing_and_logvar_is_clamped():
    assert DiagonalGaussian(torch.zeros(2, 8, 3, 3)).kl().abs().max() == 0
    wild = DiagonalGaussian(torch.full((1, 2, 1, 1), 1000.0))
    assert wild.logvar.item() == 20
    assert DiagonalGaussian(torch.full((1, 2, 1, 1), -1000.0)).logvar.item() == -30

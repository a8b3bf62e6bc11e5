from __future__ import annotations

import numpy as np
import torch
from torch.distributions import Normal, kl_divergence

from latentae.losses.latent import kl_free_bits, kl_per_element
from latentae.models.posterior import DiagonalGaussian


def plain_kl(posterior: DiagonalGaussian) -> torch.Tensor:
    return kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0))


def test_kl_is_the_closed_form_over_image_elements():
    posterior, images = (
        DiagonalGaussian(torch.randn(3, 8, 2, 5, dtype=torch.float64)),
        torch.zeros(3, 3, 16, 40),
    )
    expected = plain_kl(posterior).sum(dim=(1, 2, 3)) / (3 * 16 * 40)
    torch.testing.assert_close(kl_per_element(posterior, images), expected, rtol=1e-12, atol=0)


def test_the_ratio_to_the_pixel_loss_does_not_depend_on_the_resolution():
    small = torch.randn(2, 8, 4, 4)
    posteriors = [
        (DiagonalGaussian(small.repeat(1, 1, k, k)), torch.zeros(2, 3, 32 * k, 32 * k)) for k in (1, 2)
    ]
    torch.testing.assert_close(*(kl_per_element(*each) for each in posteriors))
    torch.testing.assert_close(*(kl_free_bits(*each, free_bits=1.0) for each in posteriors))


def test_a_standard_normal_posterior_costs_nothing_and_logvar_is_clamped():
    assert DiagonalGaussian(torch.zeros(2, 8, 3, 3)).kl().abs().max() == 0
    wild = DiagonalGaussian(torch.full((1, 2, 1, 1), 1000.0))
    assert wild.logvar.item() == 20
    assert DiagonalGaussian(torch.full((1, 2, 1, 1), -1000.0)).logvar.item() == -30


def test_free_bits_are_a_floor_for_each_channel_of_the_batch_average():
    posterior, images = (
        DiagonalGaussian(torch.randn(5, 8, 3, 2, dtype=torch.float64)),
        torch.zeros(5, 3, 24, 16),
    )
    kl = plain_kl(posterior).sum(dim=(2, 3)).mean(dim=0)
    floor = kl.sort().values[1:3].mean().item()  # two channels below, two above
    expected = np.maximum(kl.numpy(), floor).sum() / (3 * 24 * 16)
    torch.testing.assert_close(
        kl_free_bits(posterior, images, floor / 6).item(), expected, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(kl_free_bits(posterior, images, 0.0), kl_per_element(posterior, images).mean())


def test_channels_below_the_floor_are_left_alone():
    moments = torch.randn(4, 4, 3, 3)
    moments[:, 1] *= 10  # the mean of channel 1 is far out
    moments.requires_grad_()
    kl_free_bits(DiagonalGaussian(moments), torch.zeros(4, 3, 24, 24), free_bits=60.0 / 9).backward()
    assert not moments.grad[:, [0, 2]].any()
    assert moments.grad[:, [1, 3]].any()


def test_free_bits_of_two_ranks_are_those_of_the_whole_batch():
    moments = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    moments[3:] *= 3
    scale = torch.ones(1, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    images = torch.zeros(6, 3, 24, 24)

    halves = [plain_kl(DiagonalGaussian(part)).sum(dim=(2, 3)).mean(dim=0) for part in moments.chunk(2)]
    floor = torch.stack(halves).mean(dim=0).mean().item()
    whole = kl_free_bits(DiagonalGaussian(moments * scale), images, floor / 9)
    parts = [
        kl_free_bits(
            DiagonalGaussian(part * scale), images[:3], floor / 9, lambda own: torch.stack(halves).mean(dim=0)
        )
        for part in moments.chunk(2)
    ]
    for part in parts:
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=0)
    (expected,) = torch.autograd.grad(whole, scale)
    found = [torch.autograd.grad(part, scale)[0] for part in parts]
    torch.testing.assert_close((found[0] + found[1]) / 2, expected, rtol=1e-12, atol=1e-15)

"""Normalizations of networks on a CPU in channels_last, with means far above the deviations."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latentae.models.discriminator import PatchDiscriminator, _norm
from latentae.models.latent_statistics import Moments
from latentae.models.tiling.strips import affine, moments_of


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_a_discriminator_in_fp32_is_near_its_fp64(norm):
    torch.manual_seed(0)
    network = PatchDiscriminator(channels=16, layers=2, norm=norm).to(memory_format=torch.channels_last)
    for layer in network.layers:
        if isinstance(layer, nn.Conv2d) and layer.bias is not None and layer.out_channels > 1:
            nn.init.constant_(layer.bias, 100.0)  # its output, and what is normalized, is far from zero
    images = torch.rand(2, 3, 40, 40).contiguous(memory_format=torch.channels_last) * 2 - 1
    (found,) = network(images)
    (exact,) = network.double()(images.double().contiguous())
    assert (
        (found - exact).norm() / exact.norm()
    ).item() < 2e-4  # what the first convolution rounds, of 100, is left


def test_instance_norm_has_the_right_gradient_in_any_memory_order():
    layer, x, dy = _norm("instance", 8)[0], torch.randn(1, 8, 5, 6), torch.randn(1, 8, 5, 6)
    wide = x.double().requires_grad_()
    (want,) = torch.autograd.grad(F.instance_norm(wide), wide, dy.double())
    for x_format, dy_format in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        inputs = x.contiguous(memory_format=x_format).requires_grad_()
        (dx,) = torch.autograd.grad(layer(inputs), inputs, dy.contiguous(memory_format=dy_format))
        torch.testing.assert_close(dx.double(), want, rtol=1e-4, atol=1e-5)


def test_statistics_of_strips_give_the_whole():
    x = 300 + torch.randn(1, 16, 200, 100, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )
    moments, norm = Moments.empty(16), nn.GroupNorm(4, 16, eps=1e-6)
    for strip in x.split(70, dim=2):
        moments = moments.merge(moments_of(strip))
    scale, shift = (t.double().view(1, -1, 1, 1) for t in affine(norm, moments))
    want = F.group_norm(x.double(), 4, eps=1e-6)
    assert ((x.double() * scale + shift - want).norm() / want.norm()).item() < 2e-5

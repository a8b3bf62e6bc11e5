from __future__ import annotations

import pytest
import torch
from torch import nn

from latentae.models.discriminator import PatchDiscriminator


@pytest.mark.parametrize("norm", ["none", "group", "instance"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_one_logit_a_patch_down_to_the_smallest_size(norm, layers):
    model = PatchDiscriminator(3, 16, layers, norm)
    assert model(torch.zeros(2, 3, 64, 96)).shape == (2, 1, *((side >> layers) - 2 for side in (64, 96)))
    size = model.minimum_size
    assert model(torch.randn(1, 3, size, size)).shape == (1, 1, 1, 1)
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.randn(1, 3, size - 1, size - 1))


@pytest.mark.parametrize("norm", ["none", "group", "instance"])
def test_no_image_sees_another_of_its_batch(norm):
    model = PatchDiscriminator(3, 16, 2, norm)
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-6)


def test_the_published_network():
    model = PatchDiscriminator(norm="none")
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64, 128, 256, 512, 1]
    assert all(m.kernel_size == (4, 4) for m in convolutions)
    assert abs(convolutions[3].weight.std().item() - 0.02) < 1e-3

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from latentae.losses.classifier import ClassifierDistance
from latentae.losses.options import ClassifierOptions


def test_equals_the_plain_formula_in_fp64(tmp_path):
    network = timm.create_model("test_convnext").eval().double()
    save_file(network.state_dict(), tmp_path / "convnext.safetensors")
    loss = ClassifierDistance(
        ClassifierOptions(
            weight=0.1, backbone="test_convnext", weights=str(tmp_path / "convnext.safetensors")
        )
    ).double()
    x, y = (torch.rand(2, 3, 40, 48, dtype=torch.float64) * 2 - 1 for _ in range(2))
    config = network.pretrained_cfg
    mean, std = (torch.tensor(config[key], dtype=torch.float64).view(3, 1, 1) for key in ("mean", "std"))

    def logits(image):
        unit = F.interpolate(image / 2 + 0.5, size=config["input_size"][1:], mode="bilinear", antialias=True)
        return network((unit - mean) / std)

    with torch.no_grad():
        expected = ((logits(x) - logits(y)) ** 2).mean(dim=1)
    # the backbone keeps mean and std in fp32 until it is made double
    torch.testing.assert_close(loss(x, y), expected, rtol=1e-6, atol=0)
    assert not loss(x, x).any()


def test_gradient_reaches_the_image_and_nothing_is_learned():
    loss = ClassifierDistance(ClassifierOptions(weight=0.1, backbone="efficientnet-lite0"))
    assert not list(loss.parameters())
    assert not loss.state_dict()
    x = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    loss(x, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert x.grad.abs().max() > 0

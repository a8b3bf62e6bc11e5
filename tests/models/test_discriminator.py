from __future__ import annotations

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from latentae.losses.adversarial import gradient_penalty, mean_logit, twice_differentiable
from latentae.models.backbone import FrozenBackbone
from latentae.models.discriminator import FeatureDiscriminator, PatchDiscriminator, UNetDiscriminator

NORMS = ("none", "group", "instance")
# patch and unet share layers, efficientnet and vit heads: each norm in both, each network with one
KINDS = [
    *(("patch", norm) for norm in NORMS),
    ("unet", "group"),
    ("efficientnet", "none"),
    ("efficientnet", "instance"),
    ("vit", "group"),
]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file)
    return {"efficientnet": FrozenBackbone("efficientnet-lite0"), "vit": FrozenBackbone("test_vit", file)}


@pytest.fixture
def build(backbones):
    def make(kind: str, norm: str = "group") -> nn.Module:
        if kind == "patch":
            return PatchDiscriminator(3, 16, 2, norm)
        if kind == "unet":
            return UNetDiscriminator(3, 16, 2, norm)
        return FeatureDiscriminator(backbones[kind], 16, norm)

    return make


@pytest.mark.parametrize(("norm", "layers"), [("none", 1), ("group", 2), ("instance", 3)])
def test_one_logit_a_patch_down_to_the_smallest_size(norm, layers):
    model = PatchDiscriminator(3, 16, layers, norm)
    (map_,) = model(torch.zeros(2, 3, 64, 96))
    assert map_.shape == (2, 1, *((side >> layers) - 2 for side in (64, 96)))
    size = model.minimum_size
    assert model(torch.randn(1, 3, size, size))[0].shape == (1, 1, 1, 1)
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.randn(1, 3, size - 1, size - 1))


@pytest.mark.parametrize(("norm", "layers"), [("none", 1), ("group", 2), ("instance", 3), ("group", 5)])
def test_the_unet_gives_a_logit_a_patch_and_one_a_pixel(norm, layers):
    model = UNetDiscriminator(3, 16, layers, norm)
    patches, pixels = model(torch.randn(1, 3, 65, 98))  # sides that no layer divides evenly
    assert patches.shape == (1, 1, 65 >> layers, 98 >> layers)
    assert pixels.shape == (1, 1, 65, 98)
    size = model.minimum_size
    assert model(torch.randn(1, 3, size, size))[1].shape == (1, 1, size, size)


def test_a_pixels_logit_depends_on_what_is_far_away():
    model = UNetDiscriminator(3, 16, 3, "none")
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x)[1][0, 0, 32, 32], x)
    seen = gradient.abs().sum(dim=1)[0] > 0
    assert seen.any(dim=0).sum() > 20


@pytest.mark.parametrize("kind", ["efficientnet", "vit"])
def test_feature_heads_give_a_map_a_depth_down_to_the_smallest_size(build, kind):
    model = build(kind)
    maps = model(torch.rand(2, 3, 64, 96) * 2 - 1)
    expected = {"efficientnet": [(16, 24), (8, 12), (4, 6), (2, 3)], "vit": [(4, 6)] * 4}[kind]
    assert [tuple(map_.shape) for map_ in maps] == [(2, 1, *size) for size in expected]
    for norm in NORMS:
        model = build(kind, norm)
        maps = model(torch.rand(1, 3, model.minimum_size, model.minimum_size))
        assert all(torch.isfinite(map_).all() for map_ in maps)


@pytest.mark.parametrize(("kind", "norm"), KINDS)
def test_no_image_sees_another_of_its_batch_nor_an_earlier_one(build, kind, norm):
    model = build(kind, norm)
    x = torch.rand(3, 3, 64, 64) * 2 - 1
    before = {key: value.clone() for key, value in model.state_dict().items()}
    together, alone = model(x), model(x[1:2])
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one[1:2], other, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("kind", "norm"), KINDS)
def test_a_gradient_penalty_has_the_right_gradient_in_fp64(build, kind, norm):
    model = copy.deepcopy(build(kind, norm)).double()  # backbones are shared with other tests
    # away from N(0, 0.02), where the networks are nearly constant
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.2)
    size = max(model.minimum_size, 16)
    x = (torch.rand(1, 3, size, size, dtype=torch.float64) * 2 - 1).requires_grad_()
    parameters = list(model.parameters())
    directions = [torch.randn_like(p) for p in parameters]

    def penalty() -> torch.Tensor:
        with twice_differentiable():
            return gradient_penalty(model(x), x).sum()

    def shifted(step: float) -> torch.Tensor:
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=step)
        value = penalty().detach()
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=-step)
        return value

    gradients = torch.autograd.grad(penalty(), parameters, allow_unused=True)
    assert sum(g is not None for g in gradients) >= len(parameters) / 2  # the last biases move no gradient
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    step = 1e-8  # no LeakyReLU changes sign, and far above rounding
    difference = (shifted(step) - shifted(-step)) / (2 * step)
    torch.testing.assert_close(difference, slope, rtol=1e-3, atol=1e-4 * penalty().item())


@pytest.mark.parametrize("kind", ["efficientnet", "vit"])
def test_only_heads_are_trained_and_saved(build, kind):
    model = build(kind).train()
    assert all(key.startswith("heads.") for key in model.state_dict())
    assert {name for name, _ in model.named_parameters()} == set(model.state_dict())
    build(kind).load_state_dict(model.state_dict())
    network = model.backbone.frozen["network"]
    assert not any(module.training for module in network.modules())
    x = (torch.rand(1, 3, 64, 64) * 2 - 1).requires_grad_()
    mean_logit(model(x)).sum().backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in network.parameters())


def test_the_published_network_and_groups_that_divide_any_width():
    model = PatchDiscriminator(norm="none")
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64, 128, 256, 512, 1]
    assert all(m.kernel_size == (4, 4) for m in convolutions)
    assert abs(convolutions[3].weight.std().item() - 0.02) < 1e-3
    for channels in (4, 10, 50, 200):
        norms = [
            m for m in PatchDiscriminator(3, channels, 2, "group").modules() if isinstance(m, nn.GroupNorm)
        ]
        assert [m.num_channels for m in norms] == [2 * channels, 4 * channels]
        assert all(m.num_channels // m.num_groups >= 4 for m in norms)

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from latentae.losses.adversarial import (
    LeCam,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    mean_logit,
    twice_differentiable,
)
from latentae.models.backbone import FrozenBackbone

# (of real, of fake) for the discriminator and of fake for the generator, one logit at a time
PLAIN = {
    "hinge": (lambda d: np.maximum(0, 1 - d) / 2, lambda d: np.maximum(0, 1 + d) / 2, lambda d: -d),
    "vanilla": (lambda d: np.log1p(np.exp(-d)) / 2, lambda d: np.log1p(np.exp(d)) / 2, lambda d: -d),
    "non-saturating": (
        lambda d: np.log1p(np.exp(-d)),
        lambda d: np.log1p(np.exp(d)),
        lambda d: np.log1p(np.exp(-d)),
    ),
}


def logits(seed: int) -> tuple[torch.Tensor, ...]:
    """Two maps of different size for four images, fp64."""
    rng = np.random.default_rng(seed)
    return tuple(torch.tensor(rng.normal(size=shape) * 2) for shape in ((4, 1, 3, 5), (4, 1, 2, 2)))


def plain_mean(function, maps):
    return np.mean([function(m.numpy()).mean(axis=(1, 2, 3)) for m in maps], axis=0)


@pytest.mark.parametrize("kind", PLAIN)
def test_the_games_equal_their_formulas_in_fp64_and_stay_finite(kind):
    real, fake = logits(0), logits(1)
    on_real, on_fake, generator = PLAIN[kind]
    expected = plain_mean(on_real, real) + plain_mean(on_fake, fake)
    np.testing.assert_allclose(discriminator_loss(kind, real, fake).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(generator_loss(kind, fake).numpy(), plain_mean(generator, fake), rtol=1e-12)
    sure = torch.full((1, 1, 2, 2), 1e4, dtype=torch.bfloat16)
    value = discriminator_loss(kind, (-sure,), (sure,))
    assert value.dtype == torch.float32, "half precision is widened"
    assert torch.isfinite(value).all()


@pytest.mark.parametrize("kind", PLAIN)
def test_each_loss_falls_in_the_right_direction(kind):
    real, fake = ((torch.zeros(1, 1, 2, 2, requires_grad=True),) for _ in range(2))
    discriminator_loss(kind, real, fake).sum().backward()
    assert (real[0].grad < 0).all(), "the discriminator raises logits of photos"
    assert (fake[0].grad > 0).all()
    fake[0].grad = None
    generator_loss(kind, fake).sum().backward()
    assert (fake[0].grad < 0).all(), "the generator raises logits of reconstructions"
    right = torch.full((1, 1, 2, 2), 1.5, requires_grad=True)
    discriminator_loss(kind, (right,), (-right,)).sum().backward()
    assert right.grad.any() == (kind != "hinge"), "hinge lets a discriminator be that is right by a margin"


def test_every_map_counts_the_same():
    maps = (torch.full((2, 1, 8, 8), 1.0), torch.full((2, 1, 1, 1), 3.0))
    assert mean_logit(maps).tolist() == [2.0, 2.0]
    assert mean_logit([map_.bfloat16() for map_ in maps]).dtype == torch.float32


def test_gradient_penalty_of_a_known_function():
    # D(x) = sum of a x^2 over one map and of b x over another: the gradient of their sum is 2 a x +
    # b
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    maps = ((a * x.square()).sum(dim=1, keepdim=True), (b * x).sum(dim=(1, 2, 3)).view(3, 1, 1, 1))
    penalty = gradient_penalty(maps, x)
    expected = (2 * a * x + b).square().sum(dim=(1, 2, 3))
    got, known = (torch.autograd.grad(value.sum(), (a, b)) for value in (penalty, expected))
    for one, other in zip((penalty, *got), (expected, *known), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_penalty_on_a_transformer_needs_plain_attention(tmp_path):
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    backbone = FrozenBackbone("test_vit", tmp_path / "vit.safetensors")
    x = torch.rand(1, 3, 32, 32).requires_grad_()
    scale = torch.ones(1, requires_grad=True)
    with twice_differentiable():
        maps = tuple(scale * map_[:, :1] for map_ in backbone.features(x))
    penalty = gradient_penalty(maps, x).sum()
    penalty.backward()  # quadratic in the scale
    torch.testing.assert_close(scale.grad, 2 * penalty.detach().view(1), rtol=1e-4, atol=0)
    with pytest.raises(RuntimeError, match="derivative"):
        gradient_penalty(tuple(scale * map_[:, :1] for map_ in backbone.features(x)), x).sum().backward()


def test_lecam_equals_the_formula_and_its_averages_in_fp64():
    lecam = LeCam(decay=0.9).double()
    real, fake = logits(2), logits(3)
    assert not lecam(real, fake).any(), "nothing is known before the first update"
    means = [(0.7, -0.4), (0.1, 0.3), (-0.2, -0.9)]
    real_average, fake_average = means[0]  # the first update sets them
    for step, (r, f) in enumerate(means):
        lecam.update(torch.tensor(r, dtype=torch.float64), torch.tensor(f, dtype=torch.float64))
        if step:
            real_average, fake_average = 0.9 * real_average + 0.1 * r, 0.9 * fake_average + 0.1 * f
    expected = plain_mean(lambda d: np.maximum(0, d - fake_average) ** 2, real)
    expected = expected + plain_mean(lambda d: np.maximum(0, real_average - d) ** 2, fake)
    np.testing.assert_allclose(lecam(real, fake).numpy(), expected, rtol=1e-12)


def test_lecam_is_saved_with_its_averages_and_pulls_logits_towards_each_other():
    lecam = LeCam()
    lecam.update(torch.tensor(0.5), torch.tensor(-0.5))
    again = LeCam()
    again.load_state_dict(lecam.state_dict())
    for module in (lecam, again):
        module.update(torch.tensor(1.0), torch.tensor(1.0))
    assert {name: value.item() for name, value in again.state_dict().items()} == {
        name: value.item() for name, value in lecam.state_dict().items()
    }
    assert again.real.item() == pytest.approx(0.999 * 0.5 + 0.001)
    real, fake = (torch.full((1, 1, 1, 1), value, requires_grad=True) for value in (1.0, -1.0))
    again((real,), (fake,)).sum().backward()
    assert real.grad.item() > 0
    assert fake.grad.item() < 0
    assert not list(again.parameters())

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from latentae.losses.reconstruction import bce, charbonnier, l1, l2

PLAIN = {
    l1: lambda d: np.abs(d),
    l2: lambda d: d**2,
    charbonnier: lambda d: np.sqrt(d**2 + 1e-6),
}


@pytest.mark.parametrize("shape", [(3, 2, 5, 4), (1, 3, 1, 1), (2, 1, 1, 7)])
@pytest.mark.parametrize("loss", PLAIN)
def test_equals_the_plain_formula_in_fp64_and_has_a_finite_gradient_at_equal_images(loss, shape):
    x, y = torch.randn(2, *shape, dtype=torch.float64)
    expected = PLAIN[loss]((x - y).numpy()).reshape(shape[0], -1).mean(axis=1)
    np.testing.assert_allclose(loss(x, y).numpy(), expected, rtol=1e-12)
    same = x.clone().requires_grad_()
    loss(same, x).sum().backward()
    assert torch.isfinite(same.grad).all()


def test_bce_is_the_cross_entropy_of_probabilities():
    x, y = (
        torch.rand(2, 3, 4, 4, dtype=torch.float64) * 1.9 - 0.95,
        torch.rand(2, 3, 4, 4, dtype=torch.float64) * 1.9 - 0.95,
    )
    expected = F.binary_cross_entropy((x + 1) / 2, (y + 1) / 2, reduction="none").flatten(1).mean(dim=1)
    torch.testing.assert_close(bce(x, y), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("target", [-1.0, -0.4, 1.0])
def test_bce_is_convex_smooth_and_bounded_below_beyond_the_range(target):
    x = torch.linspace(-4, 4, 16001, dtype=torch.float64).requires_grad_()
    loss = bce(x.view(-1, 1, 1, 1), torch.full((16001, 1, 1, 1), target, dtype=torch.float64), epsilon=0.01)
    (slope,) = torch.autograd.grad(loss.sum(), x)
    x, loss = x.detach(), loss.detach()
    assert (slope.diff() > -1e-12).all(), "convex"
    assert slope.diff().abs().max() < 0.1 * slope.abs().max(), "without a jump"
    assert loss[(x - target).abs().argmin()] == pytest.approx(loss.min().item(), abs=1e-12), (
        "least at the target"
    )
    for wrong in ((x > 1) & (target < 1), (x < -1) & (target > -1)):
        assert (slope[wrong].abs() > 0.5).all(), "no gradient vanishes where the output is wrong"
    torch.testing.assert_close(torch.cumulative_trapezoid(slope, x), loss[1:] - loss[0], rtol=1e-3, atol=1e-3)


def test_bce_is_finite_in_half_precision():
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5], dtype=torch.float16).view(5, 1, 1, 1).requires_grad_()
    loss = bce(x, torch.ones_like(x))
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()

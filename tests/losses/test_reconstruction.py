from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from latentae.losses.reconstruction import bce, charbonnier, l1, l2, wavelet

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


def plain_wavelet(x: np.ndarray, y: np.ndarray) -> float:
    """One image [C, H, W]: each 2x2 block times the orthonormal Haar filters, block by block."""
    filters = [np.array(f) / 2 for f in ([[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]])]
    rows, columns = ([[i, min(i + 1, side - 1)] for i in range(0, side, 2)] for side in x.shape[1:])
    blocks = [(x - y)[c][np.ix_(r, k)] for c in range(x.shape[0]) for r in rows for k in columns]
    return float(np.mean([np.sqrt((f * block).sum() ** 2 + 1e-6) for block in blocks for f in filters]))


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 7), (3, 3), (1, 1)])
def test_wavelet_equals_the_plain_transform_in_fp64(size):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, *size)), rng.normal(size=(2, 3, *size))
    expected = [plain_wavelet(a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(wavelet(torch.tensor(x), torch.tensor(y)).numpy(), expected, rtol=1e-12)


def test_wavelet_a_shift_in_brightness_costs_nothing_and_lost_detail_does():
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    floor = 1e-3
    torch.testing.assert_close(wavelet(x, x + 0.3), torch.full((1,), floor, dtype=torch.float64))
    blurred = torch.nn.functional.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert wavelet(x, blurred).item() > 50 * floor
    x.requires_grad_()
    wavelet(x, x.detach()).sum().backward()
    assert torch.isfinite(x.grad).all(), "where images are equal"

from __future__ import annotations

import numpy as np
import torch

from latentae.losses.gram import gram_distance


def plain(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """One image: per layer [N, h, w], the sums of Gatys et al. 2016 written out."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        n, m = x.shape[0], x.shape[1] * x.shape[2]
        energy = sum(((x[i] * x[j]).sum() - (y[i] * y[j]).sum()) ** 2 for i in range(n) for j in range(n))
        total += energy / (4 * n**2 * m**2) / len(a)
    return total


def test_equals_the_published_sums_in_fp64():
    rng = np.random.default_rng(0)
    shapes = [(2, 3, 4, 5), (2, 6, 2, 2)]
    a, b = ([rng.normal(size=shape) for shape in shapes] for _ in range(2))
    got = gram_distance([torch.tensor(x) for x in a], [torch.tensor(x) for x in b])
    expected = [plain([x[i] for x in a], [x[i] for x in b]) for i in range(2)]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


def test_where_things_are_does_not_matter():
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert gram_distance([x], [x.roll((2, 3), (2, 3))]).max() < 1e-24
    assert gram_distance([x], [2 * x]).min() > 0.01


def test_half_precision_features_are_multiplied_in_fp32():
    x, y = (torch.randn(1, 8, 16, 16).bfloat16() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        got = gram_distance([x], [y])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), gram_distance([x.double()], [y.double()]), rtol=1e-4, atol=0)

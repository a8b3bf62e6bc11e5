from __future__ import annotations

import numpy as np
import pytest
import torch

from latentae.losses.wavelet import wavelet


def plain(x: np.ndarray, y: np.ndarray) -> float:
    """One image [C, H, W]: each 2x2 block times the orthonormal Haar filters, block by block."""
    filters = [np.array(f) / 2 for f in ([[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]])]
    rows, columns = ([[i, min(i + 1, side - 1)] for i in range(0, side, 2)] for side in x.shape[1:])
    blocks = [(x - y)[c][np.ix_(r, k)] for c in range(x.shape[0]) for r in rows for k in columns]
    return float(np.mean([np.sqrt((f * block).sum() ** 2 + 1e-6) for block in blocks for f in filters]))


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 7), (3, 3), (1, 1)])
def test_equals_the_plain_transform_in_fp64(size):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, *size)), rng.normal(size=(2, 3, *size))
    expected = [plain(a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(wavelet(torch.tensor(x), torch.tensor(y)).numpy(), expected, rtol=1e-12)


def test_a_shift_in_brightness_costs_nothing_and_lost_detail_does():
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    floor = 1e-3
    torch.testing.assert_close(wavelet(x, x + 0.3), torch.full((1,), floor, dtype=torch.float64))
    blurred = torch.nn.functional.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert wavelet(x, blurred).item() > 50 * floor
    x.requires_grad_()
    wavelet(x, x.detach()).sum().backward()
    assert torch.isfinite(x.grad).all(), "where images are equal"

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentae.losses.reconstruction import charbonnier, l1, l2

PLAIN = {
    l1: lambda d: np.abs(d),
    l2: lambda d: d**2,
    charbonnier: lambda d: np.sqrt(d**2 + 1e-6),
}


@pytest.mark.parametrize("loss", PLAIN)
@given(seed=st.integers(0, 2**31), shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)))
def test_equals_the_plain_formula_in_fp64(loss, seed, shape):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=shape), rng.normal(size=shape)
    expected = PLAIN[loss](x - y).reshape(shape[0], -1).mean(axis=1)
    np.testing.assert_allclose(loss(torch.tensor(x), torch.tensor(y)).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("loss", PLAIN)
def test_gradient_is_finite_where_images_are_equal(loss):
    x = torch.zeros(1, 3, 4, 4, requires_grad=True)
    loss(x, torch.zeros(1, 3, 4, 4)).sum().backward()
    assert torch.isfinite(x.grad).all()

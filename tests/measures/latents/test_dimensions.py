from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy, ortho_group

from latentae.measures.latents.dimensions import active_units, effective_rank


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=12), st.integers(0, 99), st.floats(1e-9, 1e9))
def test_effective_rank_is_the_exponential_of_the_entropy_in_any_basis_and_unit(values, seed, unit):
    rotation = ortho_group.rvs(len(values), random_state=seed)
    covariance = rotation @ np.diag(values) @ rotation.T * unit
    rank = effective_rank((covariance + covariance.T) / 2)
    assert rank == pytest.approx(float(np.exp(entropy(values))), rel=1e-6)
    assert 1 - 1e-9 <= rank <= len(values) + 1e-9


def test_effective_rank_of_extremes():
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.ones((4, 4))) == pytest.approx(1)
    assert effective_rank(np.diag([1.0, 1.0, 0.0, 0.0])) == pytest.approx(2)
    assert effective_rank(np.zeros((3, 3))) is None
    assert effective_rank(np.array([[5.0]])) == pytest.approx(1)


def test_active_units_vary_by_more_than_a_hundredth():
    assert active_units(np.array([0.0, 0.0099, 0.01, 0.0101, 3.0])) == 2

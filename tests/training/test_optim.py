from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentae.training.optim import learning_rate_scale
from latentae.training.options import OptimizerOptions


def test_warmup_then_cosine_in_images():
    o = OptimizerOptions(warmup_images=100, final_lr_ratio=0.1)
    assert learning_rate_scale(o, 0, 1100) == pytest.approx(0.01)
    assert learning_rate_scale(o, 49, 1100) == pytest.approx(0.5)
    assert learning_rate_scale(o, 100, 1100) == pytest.approx(1.0)
    assert learning_rate_scale(o, 600, 1100) == pytest.approx(0.55)
    assert learning_rate_scale(o, 1100, 1100) == pytest.approx(0.1)


def test_a_network_that_begins_late_warms_up_from_there():
    o = OptimizerOptions(warmup_images=100, schedule="constant")
    assert learning_rate_scale(o, 1000, 5000, start=1000) == pytest.approx(0.01)
    assert learning_rate_scale(o, 1099, 5000, start=1000) == 1.0


@given(st.integers(0, 10_000), st.integers(1, 10_000), st.integers(0, 2000), st.sampled_from(["cosine", "constant"]))
def test_scale_stays_between_zero_and_one(seen, images, warmup, schedule):
    o = OptimizerOptions(warmup_images=warmup, schedule=schedule)
    assert 0 <= learning_rate_scale(o, seen, images) <= 1

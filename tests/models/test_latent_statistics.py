from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentae.models.latent_statistics import LatentStatistics, merge

CHANNELS = 2


@st.composite
def posteriors(draw: st.DrawFn) -> list[tuple[np.ndarray, np.ndarray]]:
    """Posteriors of various sizes, offsets and spreads: mean and logvar [2, h, w]."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    result = []
    for _ in range(draw(st.integers(1, 12))):
        shape = (CHANNELS, draw(st.integers(1, 4)), draw(st.integers(1, 4)))
        offset, spread = (
            draw(st.sampled_from([0.0, 1.0, -300.0])),
            draw(st.sampled_from([0.0, 1e-3, 1.0, 50.0])),
        )
        result.append((offset + spread * rng.standard_normal(shape), rng.uniform(-30, 5, shape)))
    return result


def by_channel(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.reshape(CHANNELS, -1) for array in arrays], axis=1)


@settings(max_examples=60, deadline=None)
@given(items=posteriors(), cuts=st.lists(st.integers(0, 12), max_size=4))
def test_merged_parts_equal_numpy_over_everything(
    items: list[tuple[np.ndarray, np.ndarray]], cuts: list[int]
) -> None:
    single = [LatentStatistics.of(torch.from_numpy(mean), torch.from_numpy(logvar)) for mean, logvar in items]
    edges = [0, *sorted(min(cut, len(single)) for cut in cuts), len(single)]
    parts = [merge(single[a:b], CHANNELS) for a, b in pairwise(edges)]  # some of them empty
    total = merge(parts, CHANNELS)

    means, variances = (
        by_channel([mean for mean, _ in items]),
        np.exp(by_channel([logvar for _, logvar in items])),
    )
    scale = np.abs(means).max() + 1
    assert (total.samples, total.count) == (len(items), means.shape[1])
    np.testing.assert_allclose(total.mean, means.mean(1), rtol=0, atol=1e-13 * scale)
    np.testing.assert_allclose(total.m2 / total.count, means.var(1), rtol=1e-10, atol=1e-13 * scale**2)

    summary = total.summary()
    expected = means.var(1) + variances.mean(1)
    np.testing.assert_allclose(summary["latents_std"], np.sqrt(expected), rtol=1e-9, atol=1e-12 * scale)
    np.testing.assert_allclose(summary["latents_mean"], means.mean(1), rtol=0, atol=1e-13 * scale)
    np.testing.assert_allclose(summary["shift_factor"], means.mean(), rtol=0, atol=1e-13 * scale)
    overall = np.sqrt(means.var() + variances.mean())
    np.testing.assert_allclose(1 / summary["scaling_factor"], overall, rtol=1e-9, atol=1e-12 * scale)
    again = LatentStatistics.from_json(json.loads(json.dumps(total.to_json())))  # restores every bit
    assert again.to_json() == total.to_json()
    assert again.summary() == summary


def test_no_latent_and_constant_latents_have_no_scaling_factor() -> None:
    assert LatentStatistics.empty(3).summary()["scaling_factor"] is None
    constant = LatentStatistics.of(torch.full((2, 4, 4), 0.5), torch.full((2, 4, 4), -torch.inf))
    assert constant.summary()["scaling_factor"] is None
    assert constant.summary()["latents_mean"] == [0.5, 0.5]


@pytest.mark.parametrize(
    "broken", [{"mean": [1.0]}, {"m2": [float("nan"), 0.0]}, {"variance_sum": "x"}, {"count": "many"}]
)
def test_damaged_statistics_are_refused(broken: dict[str, object]) -> None:
    value = LatentStatistics.of(torch.zeros(2, 1, 1), torch.zeros(2, 1, 1)).to_json()
    with pytest.raises((ValueError, TypeError)):
        LatentStatistics.from_json({**value, **broken})

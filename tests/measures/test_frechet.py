from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentae.errors import DataError
from latentae.measures.frechet import frechet_distance, half_of, noise_floor, split_moments
from latentae.models.latent_statistics import Moments


def features(n: int, d: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Correlated vectors with a falling spectrum, as a network's features have."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(d, d)) * np.linspace(1, 0.05, d)
    return scale * generator.normal(size=(n, d)) @ mixing + shift


def by_square_root(a: np.ndarray, b: np.ndarray) -> float:
    """The formula, with scipy's matrix square root."""
    linalg = pytest.importorskip("scipy.linalg")
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(s @ t)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + t - 2 * root.real))


@pytest.mark.parametrize(
    ("n", "d", "scale", "shift"), [(300, 12, 1.3, 0.2), (90, 40, 0.7, 0.0), (500, 64, 1.0, 0.05)]
)
def test_the_distance_is_the_one_with_a_matrix_square_root(n, d, scale, shift):
    a, b = features(n, d), features(n - 20, d, 1, scale, shift)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(by_square_root(a, b), rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(1, 40), st.integers(0, 10_000))
def test_equal_sets_are_at_distance_0_also_with_fewer_images_than_features(n, d, seed):
    a = features(n, d, seed)
    moments, shuffled = Moments.of(a), Moments.of(a[::-1].copy())
    assert frechet_distance(moments, shuffled) <= 1e-6 * max(np.trace(moments.m2) / (n - 1), 1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 30), st.integers(0, 1000))
def test_the_distance_is_symmetric_and_does_not_see_a_rotation(n, m, d, seed):
    a, b = features(n, d, seed), features(m, d, seed + 1, 1.5, 0.3)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    value = frechet_distance(Moments.of(a), Moments.of(b))
    assert value == pytest.approx(frechet_distance(Moments.of(b), Moments.of(a)), rel=1e-8, abs=1e-10)
    assert value == pytest.approx(
        frechet_distance(Moments.of(a @ rotation), Moments.of(b @ rotation)), rel=1e-6, abs=1e-8
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 8), st.floats(-1e3, 1e3))
def test_merged_moments_are_those_of_all_vectors(sizes, d, shift):
    parts = [features(size, d, seed, shift=shift) for seed, size in enumerate(sizes)]
    everything = np.concatenate(parts)
    total = Moments.of(np.zeros((0, d)))
    for part in parts:
        total = total.merge(Moments.of(part))
    assert total.count == len(everything)
    if total.count >= 2:
        np.testing.assert_allclose(total.mean, everything.mean(0), rtol=1e-10, atol=1e-9)
        np.testing.assert_allclose(
            total.m2 / (total.count - 1), np.cov(everything, rowvar=False).reshape(d, d), rtol=1e-7, atol=1e-7
        )


def test_halves_depend_on_the_key_alone_and_are_about_equal():
    keys = [f"{number:05}" for number in range(2000)]
    second = [half_of(key) for key in keys]
    assert 900 < sum(second) < 1100
    assert half_of("photo \udcff") in (0, 1)  # a name that is no UTF-8
    values = torch.from_numpy(features(2000, 4)).float()
    halves = split_moments(keys, values)
    order = torch.randperm(2000)
    merged = None
    for rows in order.split(300):
        found = split_moments([keys[row] for row in rows], values[rows])
        merged = found if merged is None else (merged[0].merge(found[0]), merged[1].merge(found[1]))
    assert merged is not None
    assert (
        [half.count for half in merged]
        == [half.count for half in halves]
        == [2000 - sum(second), sum(second)]
    )
    assert noise_floor(merged) == pytest.approx(noise_floor(halves), rel=1e-9)


def test_the_floor_is_what_sampling_noise_gives_and_falls_with_the_number_of_images():
    floors = [noise_floor(split_moments([str(i) for i in range(n)], features(n, 20))) for n in (200, 800)]
    fresh = frechet_distance(Moments.of(features(400, 20, 1)), Moments.of(features(400, 20, 2)))
    assert floors[0] > 2 * floors[1]
    assert floors[1] == pytest.approx(fresh, rel=0.5)  # two halves of 400
    assert noise_floor(split_moments(["a", "b"], features(2, 3))) is None


def test_gaussians_whose_distance_is_known():
    a = np.random.default_rng(0).normal(size=(5000, 3))
    a = (a - a.mean(0)) @ np.linalg.inv(
        np.linalg.cholesky(np.cov(a, rowvar=False)).T
    )  # mean 0 and covariance I to rounding
    b = a * np.array([2.0, 0.5, 1.0]) + np.array([3.0, 0.0, 4.0])
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(25 + 1 + 0.25, rel=1e-10)
    one, three = np.ones((4, 3)), np.ones((5, 3)) * 3  # no spread
    assert frechet_distance(Moments.of(one), Moments.of(one)) == 0
    assert frechet_distance(Moments.of(one), Moments.of(three)) == pytest.approx(12)


def test_what_can_not_be_compared_is_refused():
    one, three, other = Moments.of(features(1, 3)), Moments.of(features(3, 3)), Moments.of(features(3, 4))
    for match, call in [
        ("needs 2 or more", lambda: frechet_distance(one, three)),
        ("3 and 4 numbers", lambda: frechet_distance(three, other)),
        ("expected \\[N, d\\]", lambda: Moments.of(np.zeros((2, 3, 4)))),
        ("NaN or infinite", lambda: Moments.of(np.full((2, 3), np.nan))),
        ("one key an image", lambda: split_moments(["a"], features(2, 3))),
    ]:
        with pytest.raises(DataError, match=match):
            call()

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from latentae.evaluation.measurement import Measurement
from latentae.evaluation.showing import choose
from latentae.measures.ranking import rank
from latentae.measures.scores import Scores


@given(st.lists(st.integers(-5, 5), max_size=30), st.randoms())
def test_equal_values_keep_their_order_whatever_their_last_bits(levels, random):
    noisy = [level * (1 + 1e-6 * random.random()) for level in levels]
    assert list(rank(noisy)) == sorted(range(len(levels)), key=lambda row: levels[row])
    noisy = [level + 1e-6 * random.random() for level in levels]
    assert list(rank(noisy, relative=0.0, absolute=1e-5)) == sorted(
        range(len(levels)), key=lambda row: levels[row]
    )


def test_differences_above_the_tolerance_count_and_infinite_values_are_equal():
    assert list(rank([1.0, 1.0 - 2e-4, 1.0 - 0.5e-4])) == [1, 0, 2]
    assert list(rank([math.inf, 3.0, math.inf, -math.inf])) == [3, 1, 0, 2]


def test_the_same_worst_and_best_images_are_shown_where_psnr_differs_by_rounding():
    exact = [30.0, 20.0, 25.0, 20.0, 30.0, 20.0, 30.0, 20.0, 30.0]
    for noise in np.random.default_rng(0).uniform(-1e-4, 1e-4, (20, 9)):
        measurement = Measurement(
            keys=list("abcdefghi"), scores={"model": Scores({"psnr": (exact + noise).tolist()})}
        )
        chosen = choose(measurement)
        assert chosen["worst"] == [1, 3, 5]
        assert chosen["best"] == [8, 6, 4]

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from latentae.measures.scores import Scores, finding, paired, rank


def scores(metric: str, values: list[float]) -> Scores:
    return Scores({metric: values})


def test_who_is_better_follows_the_paired_interval_and_the_direction_of_the_metric():
    low, high = [20.0, 25.0, 30.0, 22.0], [21.0, 26.5, 31.2, 23.0]
    assert paired(scores("psnr", high), scores("psnr", low), 0)["psnr"]["better"] == "model"
    assert paired(scores("psnr", low), scores("psnr", high), 0)["psnr"]["better"] == "baseline"
    assert paired(scores("perceptual", low), scores("perceptual", high), 0)["perceptual"]["better"] == "model"
    assert (
        paired(scores("psnr", [20.0, 25.0]), scores("psnr", [21.0, 24.0]), 0)["psnr"]["better"] == "unclear"
    )


def test_exact_images_and_missing_ones_do_not_break_a_comparison():
    result = paired(
        scores("psnr", [math.inf, 20.0, 30.0, math.inf]), scores("psnr", [math.inf, 19.0, math.nan, 25.0]), 0
    )["psnr"]
    assert (result["n"], result["infinite"], result["mean"]) == (
        2,
        1,
        0.5,
    )  # 0 where both are exact, 1 where both are finite


def test_a_finding_names_the_winner():
    result = paired(scores("psnr", [20.0, 21.0, 22.5]), scores("psnr", [24.0, 24.5, 26.0]), 0)["psnr"]
    sentence = finding("psnr", "PSNR", result, "this model", "PCA")
    assert sentence["kind"] == "bad"
    assert sentence["text"].startswith(
        "PSNR: PCA beats this model by 3.67 dB (paired 95 % interval 3.50 to 4.00, 3 images"
    )


def test_one_image_or_a_difference_that_prints_as_zero_settles_nothing():
    assert paired(scores("psnr", [20.0]), scores("psnr", [30.0]), 0)["psnr"]["better"] == "unclear"
    for difference, better in ((0.0049, "unclear"), (0.0051, "model")):
        found = paired(
            scores("psnr", [20.0 + difference, 25.0 + difference]), scores("psnr", [20.0, 25.0]), 0
        )["psnr"]
        assert found["better"] == better


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

from __future__ import annotations

import numpy as np

from latentae.evaluation.details import choose_examples
from latentae.evaluation.measurement import Measurement
from latentae.measures.scores import Scores


def test_the_same_worst_and_best_images_are_shown_where_psnr_differs_by_rounding():
    exact = [30.0, 20.0, 25.0, 20.0, 30.0, 20.0, 30.0, 20.0, 30.0]
    for noise in np.random.default_rng(0).uniform(-1e-4, 1e-4, (20, 9)):
        measurement = Measurement(
            keys=list("abcdefghi"), scores={"model": Scores({"psnr": (exact + noise).tolist()})}
        )
        chosen = choose_examples(measurement)
        assert chosen["worst"] == [1, 3, 5]
        assert chosen["best"] == [8, 6, 4]

from __future__ import annotations

import numpy as np
import pytest
import torch

from latentae.errors import OutputError
from latentae.evaluation.part import ORIGINALS, Part
from latentae.measures.latents.report import LatentReport
from latentae.measures.scores import Scores
from latentae.models.posterior import DiagonalGaussian


def part(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    report = LatentReport()
    report.add(
        DiagonalGaussian(torch.randn(count, 4, 8, 8, generator=generator)),
        torch.rand(count, 3, 32, 32, generator=generator),
    )
    numbers = np.random.default_rng(seed)
    return Part(
        positions=[5, 7, 9][:count],
        keys=["a", "b/\\udcff", "c"][:count],
        labels=["cat", "", "dog"][:count],
        scores={"model": Scores({"psnr": [1.5, float("inf"), float("nan")], "bytes": [1.0, 2.0, 3.0]}), "pca": Scores({"psnr": [0.1] * 3})},
        features={ORIGINALS: [numbers.random((2, 5), np.float32), numbers.random((1, 5), np.float32)]},
        pooled=[numbers.random((2, 6), np.float32)],
        latents=report,
        latent_shape=(2, 8, 8),
        skipped=[("bad", "why")],
        counts={"gray": 2},
    )  # fmt: skip


def test_what_is_read_is_what_was_written_to_the_last_bit(tmp_path):
    whole = part(0)
    whole.save(tmp_path / "0.npz")
    read = Part.load(tmp_path / "0.npz")
    for name in ("positions", "keys", "labels", "latent_shape", "skipped", "counts"):
        assert getattr(read, name) == getattr(whole, name)
    for method, scores in whole.scores.items():
        for metric, values in scores.values.items():
            np.testing.assert_array_equal(read.scores[method].values[metric], values)
    np.testing.assert_array_equal(read.feature_rows(ORIGINALS), whole.feature_rows(ORIGINALS))
    assert read.latents.result() == whole.latents.result()
    Part(skipped=[("a", "cut short")]).save(tmp_path / "1.npz")  # without any image
    read = Part.load(tmp_path / "1.npz")
    assert (read.skipped, read.keys) == ([("a", "cut short")], [])


def test_damage_is_one_line(tmp_path):
    part(0).save(tmp_path / "0.npz")
    data = (tmp_path / "0.npz").read_bytes()
    for damaged in (b"", data[:100], data[:-50], b"nothing"):
        (tmp_path / "0.npz").write_bytes(damaged)
        with pytest.raises(OutputError, match=r"0\.npz is damaged"):
            Part.load(tmp_path / "0.npz")

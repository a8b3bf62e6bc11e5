"""The benchmark of evaluate runs to its end on a few images and a tiny model. Its figures are not checked."""

from __future__ import annotations

import json

import pytest


def test_every_part_is_timed_beside_the_model(run, tmp_path):
    file = tmp_path / "evaluate.json"
    sizes = ("--images", 2, "--batch", 2, "--resolution", 32, "--repeats", 1, "--stream", 8)
    code, output = run("bench_evaluate", "--preset", "tiny", *sizes, "--out", file)
    assert code == 0, output
    report = json.loads(file.read_text())
    seconds = {row["part"]: row["seconds_per_image"] for row in report["rows"]}
    assert {"model", "whole", "PSNR and SSIM", "sums over latents", "pca", "dct", "jpeg", "webp"} <= seconds.keys()
    assert report["times_the_model"] == pytest.approx(seconds["whole"] / seconds["model"])
    assert {"device", "torch", "commit", "command", "grown_mib"} <= report.keys()

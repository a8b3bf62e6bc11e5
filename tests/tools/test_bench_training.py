from __future__ import annotations

import json

import pytest


def test_it_times_the_same_step_on_both_models(run, tmp_path):
    pytest.importorskip("diffusers")
    file = tmp_path / "training.json"
    sizes = ("--batch", 2, "--resolution", 32, "--repeats", 1)
    code, output = run("bench_training", *sizes, "--variants", "diffusers", "latentae", "--out", file)
    assert code == 0, output
    record = json.loads(file.read_text())
    assert [row["variant"] for row in record["rows"]] == ["diffusers", "latentae"]
    assert all(row["seconds"] > 0 and row["images_per_second"] > 0 for row in record["rows"])
    assert len({row["autoencoder_bytes"] for row in record["rows"]}) == 1  # the same weights
    assert record["resolution"] == 32
    assert record["commit"]

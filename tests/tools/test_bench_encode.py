"""The benchmark of encode runs to its end on a few images and a tiny model. Its figures are not checked."""

from __future__ import annotations

import json

import pytest


def test_both_are_timed_whole_and_in_memory(run, tmp_path):
    pytest.importorskip("diffusers")
    file = tmp_path / "encode.json"
    sizes = ("--images", 5, "--shard-size", 3, "--batch", 2, "--resolution", 32, "--workers", 1, "--repeats", 1)
    code, output = run("bench_encode", "--preset", "tiny", *sizes, "--out", file)
    assert code == 0, output
    report = json.loads(file.read_text())
    assert {"device", "torch", "commit", "command", "diffusers", "compute"} <= report.keys()
    timed = [(row["measure"], row["variant"]) for row in report["rows"] if "variant" in row]
    variants = ("latentae encode", "DataLoader + diffusers")
    assert timed == [(measure, variant) for variant in variants for measure in ("whole", "in memory")]
    assert all(row["images_per_second"] == pytest.approx(5 / row["seconds"]) for row in report["rows"] if "variant" in row)
    assert [row["stage"] for row in report["rows"] if row["measure"] == "stage"] == ["load", "read", "decode", "write"]
    seconds = {(row["measure"], row["variant"]): row["seconds"] for row in report["rows"] if "variant" in row}
    whole = seconds["whole", "latentae encode"]
    assert report["over_memory"] == pytest.approx(whole / seconds["in memory", "latentae encode"])
    assert report["times_the_baseline"] == pytest.approx(seconds["whole", "DataLoader + diffusers"] / whole)

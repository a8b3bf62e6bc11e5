from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")


def test_methods_are_compared_at_the_same_tile(run, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((96, 128), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    file = tmp_path / "tiling.json"
    code, output = run(
        "bench_tiling", "tiny", "--images", tmp_path / "photo.png", "--tile", 64, "--overlap", 0.125, "--out", file
    )
    assert code == 0, output
    rows = json.loads(file.read_text())["rows"]
    assert [row["method"] for row in rows] == ["untiled", "diffusers", "blended", "exact"] * 2
    for row in rows:
        assert (row["height"], row["width"]) == (128, 96)
        if row["method"] in ("untiled", "exact"):
            assert row["computed"] == 1
            assert row["max"] < 1e-4
    # tiles of 64 at every 48: 64 * 2 + 32 rows and 64 + 48 columns
    computed = [row["computed"] for row in rows if row["method"] == "diffusers"]
    assert computed == [pytest.approx(160 * 112 / (128 * 96), abs=1e-3)] * 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is the system's count")
def test_memory_is_measured_in_a_process_of_its_own(run, tmp_path):
    file = tmp_path / "memory.json"
    code, output = run("bench_tiling", "tiny", "--memory", 128, "--tile", 64, "--step", "decode", "encode", "--out", file)
    assert code == 0, output
    rows = json.loads(file.read_text())["rows"]
    assert [row["step"] for row in rows] == ["decode", "encode"]
    assert all(row["peak_resident_bytes"] > row["of_these_before_the_call"] > 2**26 for row in rows)

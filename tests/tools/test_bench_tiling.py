from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tools" / "bench_tiling.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False)


def test_methods_are_compared_at_the_same_tile(tmp_path):
    pytest.importorskip("diffusers")
    noise = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((192, 256), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    file = tmp_path / "tiling.json"
    result = run("tiny", "--images", str(tmp_path / "photo.png"), "--tile", "64", "--overlap", "0.125", "--out", str(file))
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["method"] for row in rows] == ["untiled", "diffusers", "blended", "exact"] * 2
    for row in rows:
        assert (row["height"], row["width"]) == (256, 192)
        if row["method"] in ("untiled", "exact"):
            assert row["computed"] == 1
            assert row["max"] < 1e-4
    # tiles of 64 at every 48: 64 * 5 + 16 rows and 64 * 3 + 48 columns
    assert [row["computed"] for row in rows if row["method"] == "diffusers"] == [
        pytest.approx(336 * 240 / (256 * 192), abs=1e-3)
    ] * 2


@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is the system's count")
def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    pytest.importorskip("diffusers")
    file = tmp_path / "memory.json"
    result = run("tiny", "--memory", "128", "--tile", "64", "--step", "decode", "encode", "--out", str(file))
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["step"] for row in rows] == ["decode", "encode"]
    assert all(row["peak_resident_bytes"] > row["of_these_before_the_call"] > 2**26 for row in rows)


def test_an_unknown_tile_is_refused():
    pytest.importorskip("diffusers")
    result = run("tiny", "--side", "64", "--tile", "30")
    assert result.returncode == 1
    assert "tile is 30 pixels" in result.stderr

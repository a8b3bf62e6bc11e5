"""The benchmark of evaluate runs to its end on a few images and a tiny model. Its figures are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tools" / "bench_evaluate.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False, timeout=600)


def test_every_part_is_timed_beside_the_model(tmp_path):
    file = tmp_path / "evaluate.json"
    sizes = ("--images", "4", "--batch", "2", "--resolution", "64", "--repeats", "1", "--stream", "32")
    done = run("--preset", "tiny", *sizes, "--out", str(file))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    seconds = {row["part"]: row["seconds_per_image"] for row in report["rows"]}
    assert {"model", "whole", "PSNR and SSIM", "sums over latents", "pca", "dct", "jpeg", "webp"} <= seconds.keys()
    assert report["times_the_model"] == pytest.approx(seconds["whole"] / seconds["model"])
    assert {"device", "torch", "commit", "command", "grown_mib"} <= report.keys()


def test_an_unknown_preset_is_refused():
    done = run("--preset", "nothing")
    assert done.returncode != 0
    assert "nothing" in done.stderr

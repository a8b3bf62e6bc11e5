from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tools" / "bench_training.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False)


def test_it_times_the_same_step_on_both_models(tmp_path):
    pytest.importorskip("diffusers")
    file = tmp_path / "training.json"
    sizes = ("--batch", "2", "--resolution", "32", "--repeats", "1")
    result = run(*sizes, "--variants", "diffusers", "latentae", "--out", str(file))
    assert result.returncode == 0, result.stderr
    record = json.loads(file.read_text())
    assert [row["variant"] for row in record["rows"]] == ["diffusers", "latentae"]
    assert all(row["seconds"] > 0 and row["images_per_second"] > 0 for row in record["rows"])
    assert len({row["autoencoder_bytes"] for row in record["rows"]}) == 1  # the same weights
    assert record["resolution"] == 32
    assert record["commit"]


def test_a_mistyped_variant_is_refused():
    result = run("--variants", "diffuser")
    assert result.returncode == 2
    assert "invalid choice" in result.stderr

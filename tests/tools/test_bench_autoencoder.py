from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tools" / "bench_autoencoder.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="times the CPU")
def test_both_models_are_timed_and_compared(tmp_path):
    pytest.importorskip("diffusers")
    file = tmp_path / "autoencoder.json"
    result = run("--preset", "tiny", "--size", "64", "--repeats", "1", "--out", str(file))
    assert result.returncode == 0, result.stderr
    record = json.loads(file.read_text())
    assert record["commit"]
    assert "--preset tiny" in record["command"]
    assert [(row["step"], row["size"]) for row in record["rows"]] == [("encode", 64), ("decode", 64)]
    for row in record["rows"]:
        assert row["dtype"] == "float32"
        assert row["ratio"]["diffusers"] == pytest.approx(row["seconds"]["diffusers"] / row["seconds"]["ours"])
        assert row["largest_difference"] < 1e-4 * row["largest_output"]
        assert max(row["error"].values()) < 1e-5


def test_an_unknown_preset_is_refused():
    pytest.importorskip("diffusers")
    result = run("--preset", "kl-f9")
    assert result.returncode == 1
    assert "unknown model preset 'kl-f9'" in result.stderr

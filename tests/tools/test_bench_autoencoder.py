from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="times the CPU")
@pytest.mark.parametrize("in_new_processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_both_models_are_timed_and_compared(in_new_processes, run, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    if not in_new_processes:  # each of the four would import torch and diffusers to measure its memory
        run("bench_autoencoder", "--help")
        monkeypatch.setattr("bench_autoencoder.ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    file = tmp_path / "autoencoder.json"
    code, output = run("bench_autoencoder", "--preset", "tiny", "--size", 32, "--repeats", 1, "--out", file)
    assert code == 0, output
    record = json.loads(file.read_text())
    assert record["commit"]
    assert "--preset tiny" in record["command"]
    assert [(row["step"], row["size"]) for row in record["rows"]] == [("encode", 32), ("decode", 32)]
    for row in record["rows"]:
        assert row["dtype"] == "float32"
        assert row["ratio"]["diffusers"] == pytest.approx(row["seconds"]["diffusers"] / row["seconds"]["ours"])
        assert row["largest_difference"] < 1e-4 * row["largest_output"]
        assert max(row["error"].values()) < 1e-5

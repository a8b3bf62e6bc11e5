"""The benchmark program runs to its end without a GPU: every case on tiny shapes, and the prediction. Its figures are not looked at."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tools" / "bench_kernels.py"), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="times the CPU")
def test_every_op_is_timed_in_turn_and_written_with_what_produced_it(tmp_path):
    done = bench("--shrink", "64", "--repeats", "1", "--out", tmp_path / "kernels.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert {"device", "torch", "triton", "commit", "command"} <= report.keys()
    assert "--shrink 64" in report["command"]
    assert {row["op"] for row in report["rows"]} >= {"norm_act", "norm_act_conv2d", "row_norm_act", "lpips_head"}
    for row in report["rows"]:
        assert list(row["seconds"]) == ["eager NCHW", "eager channels_last", "ours"]
        assert all(value > 0 for value in row["seconds"].values())
        assert row["error"] < 1e-4
        assert row["dtype"] == "float32"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="registers come from Triton's compiler")
def test_the_prediction_holds_bytes_floors_and_registers_and_no_measurement(tmp_path):
    done = bench("--predict", "--filter", "forward 8x512x64x64", "--out", tmp_path / "kernels.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["device"] is None
    assert "not measurements" in report["assumption"]
    row = next(row for row in report["rows"] if row["op"] == "norm_act")
    elements = math.prod(row["shape"])
    assert row["bytes"] == {"eager": 10 * elements, "two_pass": 6 * elements, "one_pass": 4 * elements}
    assert row["predicted_seconds"]["one_pass"] == pytest.approx(4 * elements / (0.9 * 3.35e12))
    assert row["registers"]
    assert all(0 < count <= 128 for count in row["registers"].values())
    assert row["measured"] is None
    assert "seconds" not in row


def test_a_filter_that_matches_nothing_is_refused():
    done = bench("--filter", "no such case")
    assert done.returncode != 0
    assert "no case has 'no such case' in its name" in done.stderr

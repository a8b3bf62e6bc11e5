"""The benchmark program runs to its end without a GPU: every case on tiny shapes, and the prediction. Its figures are not checked."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from latentae_kernels import aot


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="times the CPU")
def test_every_op_is_timed_in_turn_and_written_with_what_produced_it(run, tmp_path):
    sizes = ("--filter", "64x64", "--shrink", 64, "--repeats", 1)
    code, output = run("bench_kernels", *sizes, "--out", tmp_path / "kernels.json")
    assert code == 0, output
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert {"device", "torch", "triton", "commit", "command"} <= report.keys()
    assert "--shrink 64" in report["command"]
    assert {row["op"] for row in report["rows"]} == {
        "norm_act",
        "norm_act_conv2d",
        "row_norm_act",
        "lpips_head",
        "upsample_conv2d",
    }
    for row in report["rows"]:
        assert list(row["seconds"]) == ["eager NCHW", "eager channels_last", "ours"]
        assert all(value > 0 for value in row["seconds"].values())
        assert row["error"] < 1e-4
        assert row["dtype"] == "float32"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="registers come from Triton's compiler")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_prediction_holds_bytes_floors_and_registers_and_no_measurement(compiled, run, tmp_path, monkeypatch):
    if not compiled:
        used = aot.Resources(registers=100, shared=0, local=0, spills=0, wide_loads=1, f64=False)
        names = [f"norm_act/{kernel} nhwc bf16 C=512 HW=4096" for kernel in ("chunk_statistics", "merge_statistics", "apply")]
        monkeypatch.setattr(aot, "compile_all", lambda **options: [aot.Outcome(name, 90, used, ()) for name in names])
    code, output = run("bench_kernels", "--predict", "--filter", "forward 8x512x64x64", "--out", tmp_path / "kernels.json")
    assert code == 0, output
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

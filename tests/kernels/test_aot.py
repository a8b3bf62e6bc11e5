"""Every kernel compiles for every architecture within its plan, and each gate can fail. In subprocesses: this one interprets kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="compiling kernels needs Triton")

# One kernel and plans that it keeps or breaks, each in one way.
EXAMPLES = """
import triton
import triton.language as tl
from latentae_kernels.aot import Plan


@triton.jit
def scale(x, y, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0).to(ACC)
    tl.store(y + i, (value * value + 3.0).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def outer(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.load(x + i)
    squares = row[:, None] * row[None, :]
    for _ in range(n):
        squares = squares * squares + row[:, None] - row[None, :]
    tl.store(y + i, tl.sum(squares, 0) + tl.sum(squares, 1))


@triton.jit
def method_of_an_int(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i) * n.to(tl.float32))


@triton.jit
def does_not_compile(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.zeros([2 * BLOCK], tl.float32))


def plan(name, aligned=("x", "y", "n"), acc=tl.float32, **gates):
    signature = {"x": "*bf16", "y": "*bf16", "n": "i32", "ACC": "constexpr", "BLOCK": "constexpr"}
    return Plan(name, scale, signature, {"ACC": acc, "BLOCK": 2048}, aligned, **gates)


def plans():
    floats = {"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    return [
        plan("good"),
        plan("fp64", acc=tl.float64),
        plan("registers", registers=16),
        plan("narrow", aligned=("n",)),
        plan("narrow allowed", aligned=("n",), wide_loads=False),
        Plan("spills", outer, floats, {"BLOCK": 128}, ("x", "y"), num_warps=2, registers=255, wide_loads=False),
        Plan("shared", outer, floats, {"BLOCK": 32}, ("x", "y"), num_warps=4, shared=0, wide_loads=False),
        Plan("one", method_of_an_int, {"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {"BLOCK": 512}, ("x",)),
        Plan("broken", does_not_compile, {"x": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 32}, ("x",)),
        Plan("misfit", scale, {**floats, "ACC": "constexpr"}, {"BLOCK": 32}, ("x",)),
    ]
"""


def aot(*arguments: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    if folder is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(folder), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "latentae_kernels.aot", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.slow
def test_every_kernel_compiles_and_keeps_its_plan_on_every_architecture(tmp_path):
    from latentae_kernels.aot import ARCHITECTURES, kernel_modules

    done = aot("--out", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())["kernels"]
    names = {row["name"] for row in report}
    assert {(row["name"], row["arch"]) for row in report} == {(name, arch) for name in names for arch in ARCHITECTURES}
    assert {module.rsplit(".", 1)[1].removesuffix("_kernels") for module in kernel_modules()} == {n.split("/")[0] for n in names}
    for row in report:
        assert f"{row['name']} " in done.stdout
        assert row["resources"]["spills"] == 0
        assert not row["resources"]["f64"]
    assert "0 with faults" in done.stdout


def test_a_kernel_that_breaks_a_gate_fails_the_command_and_is_named(tmp_path):
    (tmp_path / "example_kernels.py").write_text(EXAMPLES)
    done = aot("example_kernels", "--arch", "90", "--out", str(tmp_path / "report.json"), folder=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {row["name"]: row["faults"] for row in json.loads((tmp_path / "report.json").read_text())["kernels"]}
    assert found["good"] == found["narrow allowed"] == []
    expected = {
        "fp64": "fp64 instructions",
        "registers": "registers a thread, the plan allows 16",
        "narrow": "no 16-byte global load",
        "spills": "local-memory instructions",
        "shared": "bytes of shared memory, the plan allows 0",
        "one": "does not compile where its ints are 1",
        "broken": "does not compile",
        "misfit": "differs in",
    }
    for name, message in expected.items():
        assert len(found[name]) == 1, (name, found[name])
        assert message in found[name][0]
        assert f"{name}, sm_90: {found[name][0]}" in done.stderr
    assert f"10 compilations, {len(expected)} with faults" in done.stdout


def test_the_filter_picks_kernels_by_name(tmp_path):
    (tmp_path / "example_kernels.py").write_text(EXAMPLES)
    done = aot("example_kernels", "--arch", "80", "100", "--filter", "good", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 compilations, 0 with faults" in done.stdout
    nothing = aot("example_kernels", "--filter", "no such kernel", folder=tmp_path)
    assert nothing.returncode == 2
    assert "no kernel plan has 'no such kernel' in its name" in nothing.stderr


def test_the_interpreter_is_refused():
    done = aot(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1" in done.stderr
    assert "Traceback" not in done.stderr

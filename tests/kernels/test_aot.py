"""Each gate of the ahead-of-time compiler can fail, and each kernel of the package has plans. `make
kernels` compiles all of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from latentae_kernels import aot

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="compiling kernels needs Triton"
)

# Kernels and plans that they keep or break, each in one way.
EXAMPLES = """
import torch
import triton
import triton.language as tl
from latentae_kernels.launcher import Plan


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


def tensor(dtype):
    return torch.empty(4096, dtype=dtype, device="meta")


def plan(name, acc=tl.float32, n=4096, **gates):
    x = tensor(torch.bfloat16)
    return Plan(name, scale, {"x": x, "y": x, "n": n, "ACC": acc, "BLOCK": 2048, "num_warps": 4}, **gates)


def plans():
    x = tensor(torch.float32)
    squares = {"x": x, "y": x, "n": 7}
    return [
        plan("good"),
        plan("fp64", acc=tl.float64),
        plan("registers", registers=16),
        plan("narrow", n=4095),
        plan("narrow allowed", n=4095, wide_loads=False),
        Plan("spills", outer, {**squares, "BLOCK": 128, "num_warps": 2}, registers=255, wide_loads=False),
        Plan("shared", outer, {**squares, "BLOCK": 32, "num_warps": 4}, shared=0, wide_loads=False),
        Plan("one", method_of_an_int, {"x": x, "n": 7, "BLOCK": 512, "num_warps": 4}),
        Plan("broken", does_not_compile, {"x": x, "BLOCK": 32, "num_warps": 4}),
    ]
"""


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    (folder / "example_kernels.py").write_text(EXAMPLES)
    return folder


@pytest.fixture
def run(examples, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process, whose kernels may be interpreted; it compiles in processes
    that it starts.
    """
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.syspath_prepend(examples)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aot", *map(str, arguments)])
        return aot.main(), *capsys.readouterr()

    return call


def test_every_op_with_kernels_has_plans_under_its_own_name():
    package = Path(aot.__file__).parent
    folders = {file.parent.name for file in package.glob("*/*.py") if "@triton.jit" in file.read_text()}
    assert folders == {module.split(".")[1] for module in aot.MODULES}
    names = []
    for module in aot.MODULES:
        plans = importlib.import_module(module).plans()
        op = module.split(".")[1]
        assert {plan.name.split("/")[0] for plan in plans} == {op}
        assert len({plan.kernel.__name__ for plan in plans}) == {"norm_act": 8}.get(op, 2)  # all of them
        names += [plan.name for plan in plans]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_a_kernel_compiles_and_keeps_its_plan_on_every_architecture(run, tmp_path):
    code, out, err = run("--filter", "row_norm_act/forward nhwc bf16 C=96", "--out", tmp_path / "report.json")
    assert code == 0, out + err
    report = json.loads((tmp_path / "report.json").read_text())["kernels"]
    assert [(row["name"], row["arch"]) for row in report] == [
        ("row_norm_act/forward nhwc bf16 C=96", arch) for arch in aot.ARCHITECTURES
    ]
    for row in report:
        assert row["resources"]["spills"] == 0
        assert row["resources"]["wide_loads"] > 0
        assert not row["resources"]["f64"]
    assert "3 compilations, 0 with faults" in out


def test_a_kernel_that_breaks_a_gate_fails_the_command_and_is_named(run, tmp_path):
    code, out, err = run("example_kernels", "--arch", 90, "--out", tmp_path / "report.json")
    assert code == 1, out + err
    found = {
        row["name"]: row["faults"] for row in json.loads((tmp_path / "report.json").read_text())["kernels"]
    }
    assert found["good"] == found["narrow allowed"] == []
    expected = {
        "fp64": "fp64 instructions",
        "registers": "registers per thread, the plan allows 16",
        "narrow": "no 16-byte global load",
        "spills": "local-memory instructions",
        "shared": "bytes of shared memory, the plan allows 0",
        "one": "does not compile where its ints are 1",
        "broken": "does not compile",
    }
    for name, message in expected.items():
        assert len(found[name]) == 1, (name, found[name])
        assert message in found[name][0]
        assert f"{name}, sm_90: {found[name][0]}" in err
    assert all(f"{name} " in out for name in found)
    assert f"9 compilations, {len(expected)} with faults" in out


def test_a_filter_that_matches_no_plan_is_refused(run):
    code, _, err = run("example_kernels", "--filter", "no such kernel")
    assert code == 2
    assert "no kernel plan has 'no such kernel' in its name" in err


def test_the_interpreter_is_refused(run, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, _, err = run()
    assert code == 2
    assert "TRITON_INTERPRET=1" in err

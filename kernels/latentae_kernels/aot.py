"""Compile every kernel ahead of time for sm_80, sm_90 and sm_100, without a GPU or a driver, and
check its resources.

    python -m latentae_kernels.aot [MODULE ...] [--arch 80 90 100] [--filter TEXT] [--out FILE.json]

Each op has a module with `plans()`: the launches of its kernels, and the registers and shared
memory that each may use.
The command compiles them, prints a table and exits with 1 if a kernel does not compile or breaks a
gate: no local memory, no fp64, 16-byte loads present, registers and shared memory within the plan.
A kernel must also compile where its int arguments are 1, which Triton turns into constants.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .dispatch import interpreted

if TYPE_CHECKING:
    from .launcher import Plan

__all__ = [
    "ARCHITECTURES",
    "MODULES",
    "AotError",
    "Outcome",
    "Resources",
    "compile_all",
    "compile_plan",
    "faults",
]

ARCHITECTURES = (80, 90, 100)  # A100; H100 and H200; B200
MODULES = tuple(
    f"latentae_kernels.{name}" for name in ("norm_act.launch", "row_norm_act.kernels", "lpips_head.kernels")
)
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}

# one executed instruction of `cuobjdump -sass`: its address, perhaps a predicate, then the opcode
# with its modifiers
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class AotError(RuntimeError):
    """Kernels cannot be compiled ahead of time here, or a module has no plans."""


@dataclass(frozen=True)
class Resources:
    """What the compiled code of one kernel uses on one architecture."""

    registers: int  # per thread
    shared: int  # bytes per block
    local: int  # bytes of stack and local memory per thread
    spills: int  # instructions that access local memory (LDL, STL)
    wide_loads: int  # global loads of 16 bytes or more (LDG.E.128, LDG.E.256, LDGSTS.128)
    f64: bool  # whether any instruction is fp64


@dataclass(frozen=True)
class Outcome:
    """One plan on one architecture: resources (None if it did not compile) and broken gates."""

    name: str
    arch: int
    resources: Resources | None
    faults: tuple[str, ...]


def compile_plan(plan: Plan, arch: int) -> Resources:
    """Compile one kernel for compute capability `arch` (80, 90, 100) and read what the code uses.

    Raises:
        AotError: Triton is missing or its interpreter is on.
        Exception: any error of the compiler.
    """
    compiled = _compile(plan, arch)
    usage, sass = _disassemble(compiled.asm["cubin"])
    return _read(usage, sass, compiled.asm["ptx"], compiled.metadata.shared)


def _refuse_interpreter() -> None:
    if interpreted():
        raise AotError(
            "TRITON_INTERPRET=1 replaces kernels by interpreted functions, which cannot be compiled; "
            "unset it and run again"
        )


def _compile(plan: Plan, arch: int, ints_are_one: bool = False) -> Any:
    """Compile for the plan's arguments; `ints_are_one` makes run-time ints the constant 1."""
    _refuse_interpreter()
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise AotError(f"compiling kernels needs Triton 3.6 or newer: {error}") from error
    signature, constants, aligned = {}, {}, {}
    for index, parameter in enumerate(plan.kernel.params):
        value = plan.arguments[parameter.name]
        if isinstance(value, Tensor):  # torch aligns memory to 16 bytes
            kind, multiple = f"*{TYPES[str(value.dtype).removeprefix('torch.')]}", True
        elif parameter.is_constexpr:
            kind, multiple = "constexpr", False
        elif ints_are_one and not parameter.do_not_specialize:
            kind, multiple, value = "constexpr", False, 1
        else:
            kind, multiple = "i32", value % 16 == 0
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        if multiple:
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(plan.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": plan.arguments["num_warps"], "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and SASS of a cubin, from the `cuobjdump` in Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, sass = (
            subprocess.run([tool, flag, file], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return usage, sass


def _read(usage: str, sass: str, ptx: str, dynamic_shared: int) -> Resources:
    found = _USAGE.search(usage)
    opcodes = [opcode.split(".") for opcode in _OPCODE.findall(sass)]
    if found is None or not opcodes:
        raise AotError(
            f"cannot parse cuobjdump's output: {usage.strip()[:200]!r}, {len(opcodes)} instructions; "
            "use the Triton version of constraints.txt"
        )
    registers, stack, static_shared, local = map(int, found.groups())
    return Resources(
        registers=registers,
        shared=static_shared + dynamic_shared,
        local=stack + local,
        spills=sum(name in ("LDL", "STL") for name, *_ in opcodes),
        wide_loads=sum(
            name in ("LDG", "LDGSTS") and not {"128", "256"}.isdisjoint(rest) for name, *rest in opcodes
        ),
        f64=re.search(r"\.f64\b", ptx) is not None,
    )


def faults(plan: Plan, resources: Resources) -> list[str]:
    """Broken gates: one message each with what was found and what the plan allows."""
    found = []
    if resources.registers > plan.registers:
        found.append(f"{resources.registers} registers per thread, the plan allows {plan.registers}")
    if resources.shared > plan.shared:
        found.append(f"{resources.shared} bytes of shared memory, the plan allows {plan.shared}")
    if resources.spills or resources.local:
        found.append(
            f"{resources.spills} local-memory instructions (LDL, STL) on {resources.local} bytes, "
            "no plan allows any"
        )
    if resources.f64:
        found.append("fp64 instructions in the PTX, no plan allows any")
    if plan.wide_loads and not resources.wide_loads:
        found.append("no 16-byte global load, the plan expects one; make the int arguments multiples of 16")
    return found


def compile_all(
    modules: Sequence[str] = MODULES, arches: Sequence[int] = ARCHITECTURES, filter: str = ""
) -> list[Outcome]:
    """Compile every plan of `modules` for each architecture, on all cores.

    Args:
        modules: importable names of modules with a `plans()` function.
        arches: compute capabilities without the point.
        filter: only plans with this text in their name.

    Raises:
        AotError: Triton's interpreter is on, Triton is missing, or no plan has the text in its
            name.
    """
    _refuse_interpreter()
    tasks = [
        (module, index, arch, arch == arches[0])
        for module in modules
        for index, plan in enumerate(_plans(module))
        for arch in arches
        if filter in plan.name
    ]
    if not tasks:
        raise AotError(f"no kernel plan has {filter!r} in its name")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # not forked: a fork would share torch's threads and the compiler's state
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(cores, len(tasks)), mp_context=context) as pool:
        return list(pool.map(_outcome, tasks, chunksize=max(1, len(tasks) // (4 * cores))))


@cache
def _plans(module: str) -> list[Plan]:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise AotError(f"cannot import {module}: {error}") from error
    if not hasattr(found, "plans"):
        raise AotError(f"{module} has no plans(); add a function that lists the launches of its kernels")
    return found.plans()


def _outcome(task: tuple[str, int, int, bool]) -> Outcome:
    """Runs in a worker, which imports the module itself: a kernel cannot be pickled."""
    module, index, arch, with_ones = task
    plan = _plans(module)[index]
    resources, found = None, []
    try:
        resources = compile_plan(plan, arch)
        found = faults(plan, resources)
    except Exception as error:  # the verdict on this kernel; the other kernels are still compiled
        found = [f"does not compile: {_brief(error)}"]
    if with_ones and resources is not None:
        try:
            _compile(plan, arch, ints_are_one=True)
        except Exception as error:
            found.append(f"does not compile where its ints are 1 and so constants: {_brief(error)}")
    return Outcome(plan.name, arch, resources, tuple(found))


def _brief(error: BaseException) -> str:
    """The error and its line: Triton's messages begin with the complete source of the kernel."""
    # from the kernel to the function it calls
    while (cause := error.__cause__) is not None and type(cause) is type(error):
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {' | '.join(lines[-2:])[-400:]}"


def _table(outcomes: Sequence[Outcome]) -> str:
    wide = max(len(outcome.name) for outcome in outcomes)
    rows: list[tuple[object, ...]] = [("kernel", "arch", "registers", "shared", "16-byte loads", "verdict")]
    for outcome in outcomes:
        use = outcome.resources
        cells = (use.registers, use.shared, use.wide_loads) if use else ("-", "-", "-")
        rows.append((outcome.name, f"sm_{outcome.arch}", *cells, "FAULT" if outcome.faults else "ok"))
    return "\n".join(
        f"{name:{wide}s}  {arch:6s} {registers!s:>9s} {shared!s:>7s} {loads!s:>13s}  {verdict}"
        for name, arch, registers, shared, loads, verdict in rows
    )


def main() -> int:
    """Run the command. Exit status: 0, 1 for a broken gate, 2 if nothing was compiled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "modules",
        nargs="*",
        default=MODULES,
        metavar="MODULE",
        help="modules with plans() (default: all ops)",
    )
    add("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities: 80 90 100")
    add("--filter", default="", metavar="TEXT", help="only kernels with this text in their name")
    add("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    try:
        outcomes = compile_all(options.modules, options.arch, options.filter)
    except AotError as error:
        print(f"aot: {error}", file=sys.stderr)
        return 2
    print(_table(outcomes))
    broken = [outcome for outcome in outcomes if outcome.faults]
    for outcome in broken:
        for fault in outcome.faults:
            print(f"{outcome.name}, sm_{outcome.arch}: {fault}", file=sys.stderr)
    print(f"{len(outcomes)} compilations, {len(broken)} with faults")
    if options.out:
        import triton

        options.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"triton": triton.__version__, "kernels": [asdict(outcome) for outcome in outcomes]}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

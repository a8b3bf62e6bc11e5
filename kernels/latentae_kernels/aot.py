"""Every kernel compiled ahead of time for sm_80, sm_90 and sm_100, without a GPU or a driver, and held to its plan.

    python -m latentae_kernels.aot [MODULE ...] [--arch 80 90 100] [--filter TEXT] [--out FILE.json]

Each `*_kernels.py` module ends with `plans()`: which kernels it launches, with which types and constants, and how many registers and how
much shared memory each may take. The command compiles them all, prints a table and exits with 1 if a kernel does not compile or breaks
one of its gates: no local memory, no fp64, 16-byte loads present, registers and shared memory within the plan; and it must still compile
where its int arguments are 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from .dispatch import interpreted

__all__ = [
    "ARCHITECTURES",
    "AotError",
    "Outcome",
    "Plan",
    "Resources",
    "compile_all",
    "compile_plan",
    "faults",
    "kernel_modules",
]

ARCHITECTURES = (80, 90, 100)  # A100; H100 and H200; B200

# one executed instruction of `cuobjdump -sass`: its address, perhaps a predicate, then the opcode with its modifiers
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class AotError(RuntimeError):
    """Kernels can't be compiled ahead of time here, or a plan does not fit its kernel."""


@dataclass(frozen=True)
class Plan:
    """One launch of one kernel, as the compiler needs to know it, and what the compiled code may use."""

    name: str  # "norm_act/apply nhwc bf16 C=128"
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # every argument: "*bf16", "*fp32", "i32", "i64", "constexpr"
    constants: dict[str, Any]  # constexpr arguments
    aligned: tuple[str, ...]  # arguments (pointers, ints) that are multiples of 16
    num_warps: int = 4
    registers: int = 128  # gate: at most so many registers a thread
    shared: int = 49152  # gate: at most so many bytes of shared memory
    wide_loads: bool = True  # gate: 16-byte global loads must be present


@dataclass(frozen=True)
class Resources:
    """What the compiled code of one kernel uses on one architecture."""

    registers: int  # a thread
    shared: int  # bytes a block
    local: int  # bytes of stack and local memory a thread
    spills: int  # instructions that touch local memory (LDL, STL)
    wide_loads: int  # global loads of 16 bytes or more (LDG.E.128, LDG.E.256, LDGSTS.128)
    f64: bool  # whether any instruction is fp64


@dataclass(frozen=True)
class Outcome:
    """One plan on one architecture: what it uses, or why it did not compile, and the gates it breaks."""

    name: str
    arch: int
    resources: Resources | None
    faults: tuple[str, ...]


def compile_plan(plan: Plan, arch: int) -> Resources:
    """Compile one kernel for compute capability `arch` (80, 90, 100) and read what the code uses.

    Raises:
        AotError: Triton is missing or its interpreter is on, or the plan and its kernel disagree about arguments.
        Exception: whatever the compiler raises for a kernel that it can't compile.
    """
    compiled = _compile(plan, arch)
    usage, sass = _disassemble(compiled.asm["cubin"])
    return _read(usage, sass, compiled.asm["ptx"], compiled.metadata.shared)


def _refuse_interpreter() -> None:
    if interpreted():
        raise AotError(
            "TRITON_INTERPRET=1 replaces kernels by interpreted functions, which can't be compiled; unset it and run again"
        )


def _compile(plan: Plan, arch: int) -> Any:
    _refuse_interpreter()
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise AotError(f"compiling kernels needs Triton 3.6 or newer: {error}") from error
    _check(plan)
    names = list(plan.kernel.arg_names)
    source = ASTSource(
        plan.kernel,
        signature={name: plan.signature[name] for name in names},
        constexprs=plan.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in plan.aligned},
    )
    # fp fusion is said out loud: Triton 3.9 warns that its default is going to change
    options = {"num_warps": plan.num_warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def ones(plan: Plan) -> Plan:
    """The plan with every run-time int equal to 1, which Triton turns into a constant: a method of a scalar then finds a Python int."""
    free = {parameter.name for parameter in plan.kernel.params if not parameter.do_not_specialize}
    ints = {name for name, kind in plan.signature.items() if kind in ("i32", "i64") and name in free}
    return replace(
        plan,
        signature=plan.signature | dict.fromkeys(ints, "constexpr"),
        constants=plan.constants | dict.fromkeys(ints, 1),
        aligned=tuple(name for name in plan.aligned if name not in ints),
    )


def _check(plan: Plan) -> None:
    names = set(plan.kernel.arg_names)
    if wrong := names ^ set(plan.signature):
        raise AotError(
            f"{plan.name}: the signature must name every argument of the kernel and no other; differs in {sorted(wrong)}"
        )
    constexprs = {name for name, kind in plan.signature.items() if kind == "constexpr"}
    if wrong := constexprs ^ set(plan.constants):
        raise AotError(
            f"{plan.name}: constants must hold a value for each constexpr argument and no other; differs in {sorted(wrong)}"
        )
    if wrong := set(plan.aligned) - (names - constexprs):
        raise AotError(
            f"{plan.name}: aligned names {sorted(wrong)}, which are no run-time arguments of the kernel"
        )


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
    opcodes = _OPCODE.findall(sass)
    if found is None or not opcodes:
        raise AotError(
            f"cuobjdump's output was not understood: {usage.strip()[:200]!r}, {len(opcodes)} instructions"
        )
    registers, stack, static_shared, local = map(int, found.groups())
    wide = [
        op for op in opcodes if op.startswith(("LDG.", "LDGSTS.")) and {"128", "256"} & set(op.split("."))
    ]
    return Resources(
        registers=registers,
        shared=static_shared + dynamic_shared,
        local=stack + local,
        spills=sum(op.split(".")[0] in ("LDL", "STL") for op in opcodes),
        wide_loads=len(wide),
        f64=re.search(r"\.f64\b", ptx) is not None,
    )


def faults(plan: Plan, resources: Resources) -> list[str]:
    """The gates that the compiled code breaks: what was found and what the plan allows, one sentence each."""
    found = []
    if resources.registers > plan.registers:
        found.append(f"{resources.registers} registers a thread, the plan allows {plan.registers}")
    if resources.shared > plan.shared:
        found.append(f"{resources.shared} bytes of shared memory, the plan allows {plan.shared}")
    if resources.spills or resources.local:
        found.append(
            f"{resources.spills} local-memory instructions (LDL, STL) on {resources.local} bytes, no plan allows any"
        )
    if resources.f64:
        found.append("fp64 instructions in the PTX, no plan allows any")
    if plan.wide_loads and not resources.wide_loads:
        found.append(
            "no 16-byte global load, the plan wants them: name the pointer and the ints that are multiples of 16 in `aligned`"
        )
    return found


def kernel_modules() -> list[str]:
    """The modules of this package that hold kernels: every `*_kernels`."""
    package = importlib.import_module(__package__ or "latentae_kernels")
    return sorted(
        f"{package.__name__}.{info.name}"
        for info in pkgutil.iter_modules(package.__path__)
        if info.name.endswith("_kernels")
    )


def compile_all(
    modules: Sequence[str] = (), arches: Sequence[int] = ARCHITECTURES, filter: str = ""
) -> list[Outcome]:
    """Compile every plan of `modules` (those of this package by default) for each architecture, on all cores.

    Args:
        modules: importable names of modules with a `plans()` function.
        arches: compute capabilities without the point.
        filter: only plans with this text in their name.

    Raises:
        AotError: Triton's interpreter is on, Triton is missing, or no plan has the text in its name.
    """
    _refuse_interpreter()
    tasks = [
        (module, index, arch, arch == arches[0])
        for module in modules or kernel_modules()
        for index, plan in enumerate(_plans(module))
        for arch in arches
        if filter in plan.name
    ]
    if not tasks:
        raise AotError(f"no kernel plan has {filter!r} in its name")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    context = multiprocessing.get_context(
        "spawn"
    )  # a fork would share torch's threads and the compiler's state
    with ProcessPoolExecutor(min(cores, len(tasks)), mp_context=context) as pool:
        return list(pool.map(_outcome, tasks, chunksize=max(1, len(tasks) // (4 * cores))))


@cache
def _plans(module: str) -> list[Plan]:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise AotError(f"{module} can't be imported: {error}") from error
    if not hasattr(found, "plans"):
        raise AotError(
            f"{module} has no plans(): end it with a function that lists the launches of its kernels"
        )
    return found.plans()


def _outcome(task: tuple[str, int, int, bool]) -> Outcome:
    """Runs in a worker, which imports the module itself: a kernel can't be sent from process to process."""
    module, index, arch, with_ones = task
    plan = _plans(module)[index]
    resources, found = None, []
    try:
        resources = compile_plan(plan, arch)
        found = faults(plan, resources)
    except Exception as error:  # whatever stops one kernel is that kernel's verdict; the others go on
        found = [f"does not compile: {_brief(error)}"]
    if with_ones and resources is not None:
        try:
            _compile(ones(plan), arch)
        except Exception as error:
            found.append(
                f"does not compile where its ints are 1, which Triton makes constants: {_brief(error)}"
            )
    return Outcome(plan.name, arch, resources, tuple(found))


def _brief(error: BaseException) -> str:
    """What went wrong and at which line: Triton's messages begin with the whole source of the kernel."""
    while (cause := error.__cause__) is not None and type(cause) is type(
        error
    ):  # from the kernel to the function it calls
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {' | '.join(lines[-2:])[-400:]}"


def _table(outcomes: Sequence[Outcome]) -> str:
    wide = max(len(outcome.name) for outcome in outcomes)
    lines = [
        f"{'kernel':{wide}s}  {'arch':6s} {'registers':>9s} {'shared':>7s} {'16-byte loads':>13s}  verdict"
    ]
    for outcome in outcomes:
        use = outcome.resources
        cells = (
            f"{use.registers:9d} {use.shared:7d} {use.wide_loads:13d}"
            if use
            else f"{'-':>9s} {'-':>7s} {'-':>13s}"
        )
        lines.append(
            f"{outcome.name:{wide}s}  sm_{outcome.arch:<3d} {cells}  {'FAULT' if outcome.faults else 'ok'}"
        )
    return "\n".join(lines)


def main() -> int:
    """The command; returns its exit status: 0, 1 for a broken gate, 2 if nothing could be compiled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "modules", nargs="*", metavar="MODULE", help="modules with plans() (default: all of latentae_kernels)"
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities: 80 90 100"
    )
    parser.add_argument(
        "--filter", default="", metavar="TEXT", help="only kernels with this text in their name"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
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

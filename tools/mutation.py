"""Mutation testing: how many small faults, planted one at a time in ten drawn modules, make the
tests fail.

    python tools/mutation.py OUT.json --seed 17 --mutants 30 --jobs 2

One module is drawn from each package. Faults are changed comparisons, operators, constants,
conditions and return values, and removed calls. For each fault the module's own test files run
(those with its name) or, if there are none, the test files that import it. To compare two commits
run it in two work trees.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

PACKAGES = ("data", "encoding", "evaluation", "exporting", "inference", "losses", "models", "tasks")
PACKAGES += ("training", "kernels")
PAIRS = [(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn), (ast.Is, ast.IsNot)]
COMPARISONS = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
OPERATORS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv}
LIMIT_S = 900.0  # of a run without a fault; a run with a fault gets three times its duration plus 20 s


def modules(root: Path, package: str) -> list[Path]:
    """Modules of a package with at least 40 possible faults."""
    folder = root / ("kernels/latentae_kernels" if package == "kernels" else f"latentae/{package}")
    return [path for path in sorted(folder.rglob("*.py")) if len(faults(path.read_text())) >= 40]


def faults(source: str) -> list[tuple[int, str]]:
    """Every fault of a module: number of the changed node in the syntax tree, and the change."""
    nodes = list(ast.walk(ast.parse(source)))
    skipped = {id(child) for node in nodes for hint in _hints(node) for child in ast.walk(hint)}
    considered = [(number, node) for number, node in enumerate(nodes) if id(node) not in skipped]
    return [(number, change) for number, node in considered if (change := _change(node))]


def planted(source: str, number: int, change: str) -> tuple[str, str]:
    """A description of the fault with its line, and the faulty module."""
    tree = ast.parse(source)
    node = list(ast.walk(tree))[number]
    label = f"{getattr(node, 'lineno', 0)}: {ast.unparse(node).splitlines()[0][:70]} -> {change}"
    _plant(node, change)
    return label, ast.unparse(ast.fix_missing_locations(tree))


def _hints(node: ast.AST) -> Iterator[ast.AST]:
    """Annotations, docstrings and `__all__`, which do not change behavior."""
    for name in ("annotation", "returns"):
        if isinstance(hint := getattr(node, name, None), ast.AST):
            yield hint
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        yield node
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
        yield node


def _change(node: ast.AST) -> str | None:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        return COMPARISONS[type(node.ops[0])].__name__
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)].__name__
    if isinstance(node, ast.BoolOp):
        return "Or" if isinstance(node.op, ast.And) else "And"
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return repr(not node.value) if isinstance(node.value, bool) else "one more"
    if isinstance(node, ast.If | ast.IfExp):
        return "condition negated"
    if isinstance(node, ast.Return) and node.value is not None:
        return "return None"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return "call removed"
    return None


def _plant(node: ast.AST, change: str) -> None:
    if isinstance(node, ast.Compare):
        node.ops[0] = COMPARISONS[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp | ast.AugAssign):
        node.op = OPERATORS[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if change == "Or" else ast.And()
    elif isinstance(node, ast.Constant):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1  # type: ignore[operator]
    elif isinstance(node, ast.If | ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Return | ast.Expr):
        node.value = ast.Constant(None)


def tests_of(root: Path, module: Path) -> list[str]:
    """Test files with a module's name, else its importers' tests, else theirs."""
    files = sorted((root / "tests").rglob("test_*.py"))
    found = [path for path in files if _imports(path, root, module)]
    if not found:
        sources = [path for folder in ("latentae", "kernels") for path in (root / folder).rglob("*.py")]
        importers = [path for path in sources if path != module and _imports(path, root, module)]
        found = [path for path in files if any(_imports(path, root, importer) for importer in importers)]
    own = [path for path in found if module.stem in path.stem]
    found = sorted(own or found, key=lambda path: path.stat().st_size)
    return [str(path.relative_to(root)) for path in found]


def _imports(path: Path, root: Path, module: Path) -> bool:
    name = ".".join(module.relative_to(root).with_suffix("").parts).removeprefix("kernels.")
    package, _, stem = name.rpartition(".")
    pattern = rf"{re.escape(package)}\.{stem}\b|from {re.escape(package)} import [^\n]*\b{stem}\b"
    if path.parent == module.parent:
        pattern += rf"|from \.{stem} import|from \. import [^\n]*\b{stem}\b"
    return bool(re.search(pattern, path.read_text()))


SERVER = """
import os, sys, pytest, torch, torchvision, timm, PIL.Image, diffusers, safetensors.torch, pydantic, typer
for line in sys.stdin:
    folder, *tests = line.split()
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        os.chdir(folder)
        sys.path[:0] = [folder, folder + "/kernels"]
        os.environ["PYTHONPATH"] = folder + os.pathsep + folder + "/kernels"
        os.dup2(os.open(folder + "/log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
        options += ["-W", "ignore:Module already imported"]
        os._exit(int(pytest.main([*options, *tests])))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Worker:
    """A copy of the tree, and a process with loaded libraries that forks for each fault."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        for name in ("latentae", "kernels", "tests", "tools", "docs", "benchmarks"):
            shutil.copytree(root / name, folder / name)
        for name in ("pyproject.toml", "README.md", "Makefile", "CHANGELOG.md", "constraints.txt"):
            shutil.copy(root / name, folder / name)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        environment["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / ".hyp")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], env=environment, **pipes)

    def run(self, tests: list[str], limit_s: float) -> tuple[str, float]:
        """'survived', 'killed' or 'timed out', and the duration in seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        begun = time.monotonic()
        self.process.stdin.write(" ".join([str(self.folder), *tests]) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        alarm = subprocess.Popen(["sh", "-c", f"sleep {limit_s}; kill -9 -{child}"], start_new_session=True)
        code = int(self.process.stdout.readline())
        os.killpg(alarm.pid, signal.SIGKILL)
        alarm.wait()
        took = time.monotonic() - begun
        return ("survived" if code == 0 else "timed out" if code < 0 else "killed"), took


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, help="JSON file to write")
    add("--seed", type=int, default=17, help="random seed of the modules and faults")
    add("--mutants", type=int, default=30, help="faults per module")
    add("--jobs", type=int, default=2, help="parallel processes")
    add("--drawn-from", type=Path, help="work tree of the modules to draw and mutate (default: this one)")
    options = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    origin = (options.drawn_from or root).resolve()
    draw = random.Random(options.seed)
    drawn = [draw.choice(modules(origin, package)) for package in PACKAGES]
    names = ", ".join(str(path.relative_to(origin)) for path in drawn)
    print(f"seed {options.seed} draws: {names}", flush=True)
    free: Queue[Worker] = Queue()
    rows = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        for number in range(options.jobs):
            free.put(Worker(root, Path(folder) / str(number)))

        def measure(path: Path, tests: list[str], source: str | None, limit_s: float) -> tuple[str, float]:
            worker = free.get()
            target = worker.folder / path.relative_to(origin)
            correct = (root / path.relative_to(origin)).read_text()
            try:
                target.write_text(correct if source is None else source)
                return worker.run(tests, limit_s)
            finally:
                target.write_text(correct)
                free.put(worker)

        for path in drawn:
            module = str(path.relative_to(origin))
            tests = tests_of(root, root / path.relative_to(origin))
            sound, took = measure(path, tests, None, LIMIT_S)
            print(f"{module}: {len(tests)} test files, {took:.0f} s without a fault", flush=True)
            if sound != "survived":
                logs = [(Path(folder) / str(number) / "log.txt") for number in range(options.jobs)]
                newest = max((log for log in logs if log.exists()), key=lambda log: log.stat().st_mtime)
                sys.exit(f"the tests of {module} fail without a fault:\n{newest.read_text()[-4000:]}")
            source = path.read_text()
            drawn_faults = random.Random(f"{options.seed} {module}").sample(faults(source), options.mutants)
            sample = [planted(source, *fault) for fault in drawn_faults]
            limit_s = 3 * took + 20
            run = partial(measure, path, tests, limit_s=limit_s)
            found = list(pool.map(run, [faulty for _, faulty in sample]))
            ends = zip(sample, found, strict=True)
            survivors = [label for (label, _), (end, _) in ends if end == "survived"]
            row = {"module": module, "tests": tests, "sound": sound, "mutants": len(sample)}
            rows.append(row | {"survivors": survivors})
            killed = f"  {len(sample) - len(survivors)} of {len(sample)} killed"
            print(killed, *survivors, sep="\n    ", flush=True)
            options.out.write_text(json.dumps({"seed": options.seed, "modules": rows}, indent=1))
        while not free.empty():
            free.get().process.terminate()


if __name__ == "__main__":
    main()

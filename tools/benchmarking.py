"""Shared by the programs of this folder: command line, timing, and what each result records about
itself.

Variants take turns within one run, so that drift of the machine's speed affects all of them;
medians are reported. On a GPU a variant is a CUDA graph over several sets of buffers that exceed
the L2 cache: launches cost nothing and every read is cold.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "ROOT",
    "about",
    "command_line",
    "copy_bandwidth",
    "cpu_seconds",
    "cuda_seconds",
    "default_device",
    "event_seconds",
    "matmul_rate",
    "peak_bytes",
    "result_file",
    "save",
    "sets_beyond_cache",
    "version",
    "write_json",
]

ROOT = Path(__file__).resolve().parent.parent
Call = Callable[[], object]


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """A parser with --out whose help is the program's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write instead of the one in benchmarks/DEVICE")
    return parser


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def result_file(device: torch.device, name: str) -> Path:
    """benchmarks/DEVICE/NAME.json, where DEVICE is "nvidia-h100-80gb-hbm3" or "cpu-2-cores"."""
    folder = f"cpu-{torch.get_num_threads()}-cores"
    if device.type == "cuda":
        folder = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return ROOT / "benchmarks" / folder / f"{name}.json"


def save(out: Path, device: torch.device, report: Mapping[str, Any]) -> None:
    """Write a report with its device, versions, commit and command."""
    write_json(out, {**about(device), **report})
    print(f"wrote {out}")


def about(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and command."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    else:
        name, driver = f"cpu, {torch.get_num_threads()} threads", ""
    return {
        "device": name,
        "driver": driver or None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """HEAD, marked if the work tree has uncommitted changes."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", "kernels", "latentae", "tools")
    return f"{head} with changes" if head and changed else head or None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON with one line per top-level value and per row of `rows`, for readable diffs."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items() if key != "rows"]
    if "rows" in content:
        rows = ",\n".join(f"  {json.dumps(row)}" for row in content["rows"])
        lines.append(f'"rows": [\n{rows}\n ]')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n " + ",\n ".join(lines) + "\n}\n")


def cpu_seconds(calls: Mapping[str, Call], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns.

    With one thread it is CPU time, which other programs on the machine disturb less than the clock.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(call: Call) -> float:
        start = clock()
        call()
        return clock() - start

    return _medians(calls, seconds, repeats, warmup)


def event_seconds(calls: Mapping[str, Call], repeats: int, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each call on the GPU's clock, the calls taking turns."""

    def seconds(call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    return _medians(calls, seconds, repeats, warmup)


def _medians(
    calls: Mapping[str, Call], seconds: Callable[[Call], float], repeats: int, warmup: int
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + warmup):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: statistics.median(values[warmup:]) for name, values in times.items()}


def sets_beyond_cache(bytes_per_set: int, device: torch.device) -> int:
    """Number of buffer sets that exceed the L2 cache four times; at least two."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-4 * cache // max(bytes_per_set, 1)))


def cuda_seconds(variants: Mapping[str, Sequence[Call]], repeats: int) -> dict[str, float]:
    """Median seconds of one call of each variant; `variants` has a list of calls, one per set of
    buffers.

    Must run inside `torch.cuda.stream(side stream)`, in which the calls' inputs (and for a backward
    pass its forward pass) were created too: autograd runs a backward pass on the stream of its
    forward pass, and a capture sees only its own stream.
    """
    stream = torch.cuda.current_stream()
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    kept = []  # results stay alive, so that no two calls of a graph write to the same memory
    for name, calls in variants.items():
        for call in calls[:2]:
            call()  # compiles, and loads what a capture must not load
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name], stream=stream):
            kept.append([call() for call in calls])
    replays = {name: graph.replay for name, graph in graphs.items()}
    seconds = event_seconds(replays, repeats)
    return {name: value / len(variants[name]) for name, value in seconds.items()}


def copy_bandwidth(device: torch.device, repeats: int = 20) -> float:
    """Bytes per second (read and written) of a copy of 1 GiB, or an eighth of free memory."""
    elements = min(2**29, torch.cuda.mem_get_info(device)[0] // 16)
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = cuda_seconds({"copy": [lambda: target.copy_(source)]}, repeats)["copy"]
    return 2 * source.nbytes / seconds


def matmul_rate(device: torch.device, repeats: int = 20) -> float:
    """Operations per second of a bf16 product of two 8192 x 8192 matrices."""
    side = 8192
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / cuda_seconds({"matmul": [lambda: left @ right]}, repeats)["matmul"]


def peak_bytes(call: Call) -> int:
    """Peak device memory of a call above the memory allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before

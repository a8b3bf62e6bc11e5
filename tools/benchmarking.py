"""How the programs of this folder measure, and what each result says about itself.

Variants of one thing take turns within one run, so that a machine whose speed drifts slows all of them; medians are reported. On a GPU a
variant is a CUDA graph over several sets of buffers, more than the L2 cache holds: launches cost nothing and every read is cold.
"""

from __future__ import annotations

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
    "copy_bandwidth",
    "cpu_seconds",
    "cuda_seconds",
    "default_device",
    "folder_name",
    "matmul_rate",
    "peak_bytes",
    "sets_beyond_cache",
    "version",
    "write_json",
]

ROOT = Path(__file__).resolve().parent.parent
Call = Callable[[], object]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def folder_name(device: torch.device) -> str:
    """The folder of a device under benchmarks/: "nvidia-h100-80gb-hbm3", "cpu-2-cores"."""
    if device.type == "cpu":
        return f"cpu-{torch.get_num_threads()}-cores"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def about(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and command: what a figure needs beside it."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        or None
        if cuda
        else None,
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
    """HEAD, with a word where the tree has changes that it does not hold."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", "kernels", "latentae", "tools")
    return f"{head} with changes" if head and changed else head or None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON with one line for each top-level value and each row of `rows`, so that changes read well."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items() if key != "rows"]
    if "rows" in content:
        rows = ",\n".join(f"  {json.dumps(row)}" for row in content["rows"])
        lines.append(f'"rows": [\n{rows}\n ]')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n " + ",\n ".join(lines) + "\n}\n")


def cpu_seconds(calls: Mapping[str, Call], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + warmup):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def sets_beyond_cache(bytes_per_set: int, device: torch.device) -> int:
    """How many sets of buffers it takes to exceed the L2 cache four times over; at least two."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-4 * cache // max(bytes_per_set, 1)))


def cuda_seconds(variants: Mapping[str, Sequence[Call]], repeats: int, warmup: int = 3) -> dict[str, float]:
    """Median seconds of one call of each variant; `variants` holds a list of calls, one per set of buffers.

    Must run inside `torch.cuda.stream(side stream)`, in which the calls' inputs (and, for a backward pass, its forward pass) were made too:
    autograd runs a backward pass on the stream of its forward pass, and a capture sees only its own stream.
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
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + warmup):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat >= warmup:
                times[name].append(1e-3 * start.elapsed_time(end) / len(variants[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(device: torch.device, repeats: int = 20) -> float:
    """Bytes per second, read and written, of copying 1 GiB of bf16 (an eighth of the free memory if that is less)."""
    elements = min(2**29, torch.cuda.mem_get_info(device)[0] // 16)
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = cuda_seconds({"copy": [lambda: target.copy_(source)]}, repeats)["copy"]
    return 2 * source.nbytes / seconds


def matmul_rate(device: torch.device, repeats: int = 20) -> float:
    """Operations per second of multiplying two bf16 matrices of side 8192."""
    side = 8192
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / cuda_seconds({"matmul": [lambda: left @ right]}, repeats)["matmul"]


def peak_bytes(call: Call) -> int:
    """Device memory that a call takes at its highest, above what was held before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before

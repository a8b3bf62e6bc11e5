"""Time each kernel's backends side by side and print or save a table.

    python tools/bench_kernels.py [--out benchmarks/DEVICE/kernels.json] [--repeats 20]

The variants of an op take turns within one run, so that a machine whose speed drifts slows all of them; medians are reported,
with the ratio to plain torch (`F.group_norm` + `F.silu`).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from latentae_kernels import norm_act
from torch import Tensor

# (batch, channels, side, groups): levels of an f8 autoencoder at 256 pixels, and of the tiny one at 64
SHAPES = [(1, 128, 256, 32), (1, 256, 128, 32), (1, 512, 64, 32), (16, 32, 64, 8), (16, 64, 16, 8)]


def plain(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, 1e-6))


def ours(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return norm_act(x, weight, bias, groups)


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {"torch": plain, "norm_act": ours}


def seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    shape: tuple[int, int, int, int], dtype: torch.dtype, backward: bool, repeats: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each variant on one shape."""
    batch, channels, side, groups = shape
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, channels, device=device, dtype=dtype)
    gradient = torch.randn_like(x)
    inputs = (x.requires_grad_(backward), weight.clone().requires_grad_(backward), bias.clone().requires_grad_(backward))

    def call(name: str) -> None:
        y = VARIANTS[name](*inputs, groups)
        if backward:
            torch.autograd.grad(y, inputs, gradient)

    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(repeats + 3):
        for name, values in times.items():
            value = seconds(lambda name=name: call(name), device)
            if repeat >= 3:
                values.append(value)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each variant")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    print(f"{'shape':24s} {'pass':9s} " + " ".join(f"{name:>12s}" for name in VARIANTS) + "   norm_act/torch")
    for shape in SHAPES:
        for backward in (False, True):
            medians = measure(shape, dtype, backward, options.repeats, device)
            ratio = medians["norm_act"] / medians["torch"]
            kind = "fwd+bwd" if backward else "fwd"
            print(f"{shape!s:24s} {kind:9s} " + " ".join(f"{1e3 * t:9.3f} ms" for t in medians.values()) + f"   {ratio:.3f}")
            rows.append({"op": "norm_act", "shape": shape, "dtype": str(dtype), "pass": kind, "seconds": medians, "ratio": ratio})
    if options.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
        about = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit,
            "command": " ".join(["python", *sys.argv]),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

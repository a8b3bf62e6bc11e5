"""Time encode and decode of an autoencoder beside diffusers' AutoencoderKL with the same weights, into benchmarks/DEVICE/autoencoder.json.

    python tools/bench_autoencoder.py [--preset kl-f8] [--size 256] [--batch 1] [--dtype float32] [--repeats 9] [--out FILE.json]

Variants take turns in one run; medians. On a CPU: diffusers as users run it (channels first) and ours, fp32 unless told otherwise. On a
CUDA GPU: diffusers, diffusers compiled in channels_last, and ours, bf16, at sides 256, 512 and 1024. Launches count: there are no CUDA
graphs here. Each output is compared with diffusers in fp64; a variant far from it is not timed. Peak memory is above what weights and
inputs take; on a CPU (Linux) a fresh process per variant measures it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import re
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarking import (
    ROOT,
    about,
    cpu_seconds,
    default_device,
    folder_name,
    peak_bytes,
    version,
    write_json,
)
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as DiffusersAutoencoderKL
from diffusers.utils import logging
from torch import Tensor

from latentae.errors import LatentAEError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.presets import preset

Call = Callable[[], Tensor]
WORST_ERROR = {
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}  # relative to diffusers in fp64, 2-norm


@dataclass(frozen=True)
class Setting:
    """What is measured: one model at one size."""

    preset: str
    size: int
    batch: int
    dtype: torch.dtype
    device: torch.device

    def inputs(self) -> dict[str, Tensor]:
        """An image batch to encode and a latent batch to decode, the same numbers in every call."""
        config = preset(self.preset)
        generator = torch.Generator().manual_seed(0)
        side = self.size // config.downsampling
        images = torch.rand(self.batch, config.in_channels, self.size, self.size, generator=generator) * 2 - 1
        latents = torch.randn(self.batch, config.latent_channels, side, side, generator=generator)
        return {"encode": images.to(self.device, self.dtype), "decode": latents.to(self.device, self.dtype)}


def build(
    name: str, setting: Setting, dtype: torch.dtype | None = None
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Encode (to the posterior's mean) and decode of one variant; the same seed gives all of them the same weights."""
    config = preset(setting.preset)
    torch.manual_seed(0)
    ours = AutoencoderKL(config).eval()
    place: dict[str, Any] = {"device": setting.device, "dtype": dtype or setting.dtype}
    if name == "ours":
        ours.to(**place, memory_format=torch.channels_last)
        return {"encode": lambda x: ours.encode(x).mode(), "decode": ours.decode}
    theirs: Any = DiffusersAutoencoderKL(**config.model_dump()).eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.to(**place)
    encode, decode = lambda x: theirs.encode(x).latent_dist.mode(), lambda z: theirs.decode(z).sample
    if name == "diffusers":
        return {"encode": encode, "decode": decode}
    theirs.to(memory_format=torch.channels_last)
    encode, decode = torch.compile(encode, dynamic=False), torch.compile(decode, dynamic=False)
    return {"encode": lambda x: encode(_last(x)), "decode": lambda z: decode(_last(z))}


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def variants(device: torch.device) -> list[str]:
    return ["diffusers", "ours"] if device.type == "cpu" else ["diffusers", "diffusers compiled", "ours"]


def measure(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """A row for encode and one for decode."""
    models = {name: build(name, setting) for name in variants(setting.device)}
    exact = build("diffusers", setting, torch.float64)
    rows = []
    for step, x in setting.inputs().items():
        calls: dict[str, Call] = {
            name: lambda model=model, x=x, step=step: model[step](x) for name, model in models.items()
        }
        row = {"step": step, "preset": setting.preset, "size": setting.size, "batch": setting.batch}
        row["dtype"] = str(setting.dtype).removeprefix("torch.")
        row |= compare(calls, exact[step](x.double()).cpu(), WORST_ERROR[setting.dtype])
        if setting.device.type == "cpu":
            row["peak_bytes"] = {name: _peak_in_new_process(name, setting, step) for name in calls}
            row["seconds"] = cpu_seconds(calls, repeats)
        else:
            row["peak_bytes"] = {name: peak_bytes(call) for name, call in calls.items()}
            row["seconds"] = event_seconds(calls, repeats)
        row["ratio"] = {
            name: value / row["seconds"]["ours"] for name, value in row["seconds"].items() if name != "ours"
        }
        print(_line(row), flush=True)
        rows.append(row)
    return rows


def compare(calls: Mapping[str, Call], exact: Tensor, worst: float) -> dict[str, Any]:
    """How far each variant is from fp64 (relative, 2-norm), and ours from diffusers (largest difference of a value)."""
    outputs = {name: call().double().cpu() for name, call in calls.items()}
    norm = torch.linalg.vector_norm
    error = {name: float(norm(output - exact) / norm(exact)) for name, output in outputs.items()}
    for name, value in error.items():
        if not value <= worst:
            raise SystemExit(
                f"{name}: relative error {value:.1e}, expected at most {worst:.0e}; nothing was timed"
            )
    largest = float((outputs["ours"] - outputs["diffusers"]).abs().max())
    return {"error": error, "largest_difference": largest, "largest_output": float(exact.abs().max())}


def event_seconds(calls: Mapping[str, Call], repeats: int, warmup: int = 3) -> dict[str, float]:
    """Median seconds on the GPU's clock, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + warmup):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if repeat >= warmup:
                times[name].append(1e-3 * start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def _peak_in_new_process(name: str, setting: Setting, step: str) -> int | None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_resident, name, setting, step).result()


@torch.no_grad()
def _peak_resident(name: str, setting: Setting, step: str) -> int | None:
    """The most resident memory of this process while a step runs twice, above what it holds before; None where the system can't say."""
    logging.set_verbosity_error()
    call, x = build(name, setting)[step], setting.inputs()[step]
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that building has freed must not serve the step uncounted
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = _status("VmRSS")
        call(x)
        call(x)
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def _line(row: Mapping[str, Any]) -> str:
    times = "  ".join(f"{name} {value:.4f} s" for name, value in row["seconds"].items())
    ratios = "  ".join(f"{value:.2f} x {name}" for name, value in row["ratio"].items())
    memory = "  ".join(
        f"{name} {value / 2**20:.0f}" for name, value in row["peak_bytes"].items() if value is not None
    )
    errors = "  ".join(f"{name} {value:.1e}" for name, value in row["error"].items())
    what = f"{row['step']} {row['preset']} {row['batch']}x{row['size']} {row['dtype']}"
    return f"{what}: {times} | ours is {ratios} | peak MiB: {memory} | error: {errors}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="kl-f8", help="the model's shape")
    parser.add_argument(
        "--size", type=int, nargs="+", help="sides of the images (default: 256; on a GPU also 512 and 1024)"
    )
    parser.add_argument("--batch", type=int, default=1, help="images in a batch")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32, bfloat16 on a GPU"
    )
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each variant")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write instead of benchmarks/DEVICE/autoencoder.json"
    )
    options = parser.parse_args()
    logging.set_verbosity_error()
    device = default_device()
    sizes = options.size or ([256] if device.type == "cpu" else [256, 512, 1024])
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    rows = []
    try:
        with torch.no_grad():
            for size in sizes:
                rows += measure(Setting(options.preset, size, options.batch, dtype, device), options.repeats)
    except LatentAEError as error:
        raise SystemExit(f"bench_autoencoder: {error}") from None
    out = options.out or ROOT / "benchmarks" / folder_name(device) / "autoencoder.json"
    write_json(out, {**about(device), "diffusers": version("diffusers"), "rows": rows})
    print(f"wrote {out}")


if __name__ == "__main__":
    main()

"""Time encode and decode of an autoencoder and of diffusers' AutoencoderKL with the same weights.

    python tools/bench_autoencoder.py [--preset kl-f8] [--size 256] [--dtype float32] [--variants
    NAME ...]

Variants take turns in one run; medians. Each output is compared with diffusers in fp64; a variant
far from it is not timed. On a CPU: diffusers in its default memory format and ours, in fp32. On a
CUDA GPU: diffusers, diffusers compiled in channels_last, and ours, in bf16, at sides 256, 512 and
1024; launches count, since there are no CUDA graphs. "ours, native 3x3" and "ours, Winograd 3x3"
fix the CPU's method for 3x3 convolutions. Peak memory is above that of weights and inputs; on a CPU
(Linux) a new process per variant measures it. Writes benchmarks/DEVICE/autoencoder.json.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarking import (
    command_line,
    cpu_seconds,
    default_device,
    event_seconds,
    peak_bytes,
    result_file,
    save,
    version,
)
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as DiffusersAutoencoderKL
from diffusers.utils import logging
from latentae_kernels import winograd
from torch import Tensor

from latentae.errors import LatentAEError
from latentae.models.config import build as build_model
from latentae.models.presets import preset

Call = Callable[[], Tensor]
VARIANTS = ("diffusers", "diffusers compiled", "ours", "ours, native 3x3", "ours, Winograd 3x3")
# largest error relative to diffusers in fp64, 2-norm
WORST_ERROR = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Setting:
    """What is measured: one model at one size."""

    preset: str
    size: int
    batch: int
    dtype: torch.dtype
    device: torch.device

    def inputs(self) -> dict[str, Tensor]:
        """An image batch to encode and a latent batch to decode, from a fixed seed."""
        config = preset(self.preset)
        generator = torch.Generator().manual_seed(0)
        side = self.size // config.downsampling
        images = torch.rand(self.batch, config.in_channels, self.size, self.size, generator=generator) * 2 - 1
        latents = torch.randn(self.batch, config.latent_channels, side, side, generator=generator)
        return {"encode": images.to(self.device, self.dtype), "decode": latents.to(self.device, self.dtype)}


def build(
    name: str, setting: Setting, dtype: torch.dtype | None = None
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Encode (to the posterior's mean) and decode of a variant; all have the same weights."""
    config = preset(setting.preset)
    torch.manual_seed(0)
    ours = build_model(config).eval()
    place: dict[str, Any] = {"device": setting.device, "dtype": dtype or setting.dtype}
    if name.startswith("ours"):
        ours.to(**place, memory_format=torch.channels_last)
        calls = {"encode": lambda x: ours.encode(x).mode(), "decode": ours.decode}
        return {step: _with_convolutions(name, call) for step, call in calls.items()}
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


def _with_convolutions(name: str, call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`call` with the method for 3x3 convolutions that the variant's name gives."""

    def method() -> AbstractContextManager[Any]:
        if name.endswith("native 3x3"):
            return patch.object(winograd, "_pays", lambda x, weight: False)
        if name.endswith("Winograd 3x3"):
            return patch.object(winograd, "_capability", lambda: winograd._MEASURED)
        return nullcontext()

    def run(x: Tensor) -> Tensor:
        with method():
            return call(x)

    return run


def measure(setting: Setting, variants: list[str], repeats: int) -> list[dict[str, Any]]:
    """A row for encode and one for decode."""
    models = {name: build(name, setting) for name in variants}
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
        seconds = dict(row["seconds"])
        ours = seconds.pop("ours")
        row["ratio"] = {name: value / ours for name, value in seconds.items()}
        print(_line(row), flush=True)
        rows.append(row)
    return rows


def compare(calls: Mapping[str, Call], exact: Tensor, worst: float) -> dict[str, Any]:
    """Relative errors (2-norm) against fp64, and the largest difference from diffusers."""
    outputs = {name: call().double().cpu() for name, call in calls.items()}
    norm = torch.linalg.vector_norm
    error = {name: float(norm(output - exact) / norm(exact)) for name, output in outputs.items()}
    for name, value in error.items():
        if not value <= worst:
            raise SystemExit(
                f"{name}: relative error {value:.1e}, expected at most {worst:.0e}; nothing was timed"
            )
    largest = max(float((output - outputs["diffusers"]).abs().max()) for output in outputs.values())
    return {"error": error, "largest_difference": largest, "largest_output": float(exact.abs().max())}


def _peak_in_new_process(name: str, setting: Setting, step: str) -> int | None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_resident, name, setting, step).result()


@torch.no_grad()
def _peak_resident(name: str, setting: Setting, step: str) -> int | None:
    """Peak resident memory of two runs of a step above that before, or None."""
    logging.set_verbosity_error()
    call, x = build(name, setting)[step], setting.inputs()[step]
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory must not serve the step uncounted
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
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
    device = default_device()
    cpu = device.type == "cpu"
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--preset", default="kl-f8", help="model preset")
    add("--size", type=int, nargs="+", default=[256] if cpu else [256, 512, 1024], help="sides in pixels")
    add("--batch", type=int, default=1, help="images per batch")
    dtypes = ["float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, default=dtypes[0 if cpu else 1], help="dtype of weights and inputs")
    add("--repeats", type=int, default=9, help="timed runs of each variant")
    default = ["diffusers", "ours"] if cpu else list(VARIANTS[:3])
    add(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=default,
        help="what to time, with ours and diffusers",
    )
    options = parser.parse_args()
    variants = list(dict.fromkeys(["diffusers", *options.variants, "ours"]))
    logging.set_verbosity_error()
    rows = []
    try:
        with torch.no_grad():
            for size in options.size:
                setting = Setting(options.preset, size, options.batch, getattr(torch, options.dtype), device)
                rows += measure(setting, variants, options.repeats)
    except LatentAEError as error:
        raise SystemExit(f"bench_autoencoder: {error}") from None
    out = options.out or result_file(device, "autoencoder")
    save(out, device, {"diffusers": version("diffusers"), "rows": rows})


if __name__ == "__main__":
    main()

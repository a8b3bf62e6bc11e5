"""Launches kernels, or records the launches for ahead-of-time compilation (aot.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

__all__ = ["Plan", "accumulator", "launch", "processors", "recorded_launches"]

Launch = tuple[Any, dict[str, Any]]  # the @triton.jit function and its arguments

_recording: list[Launch] | None = None


@dataclass(frozen=True)
class Plan:
    """A kernel to compile ahead of time, and the resources that its code may use."""

    name: str  # "norm_act/apply nhwc bf16 C=128 HW=65536"
    kernel: Any  # the @triton.jit function
    arguments: Mapping[str, Any]  # of one launch: meta tensors, ints, constexprs and num_warps
    registers: int = 128  # gate: maximum registers per thread
    shared: int = 49152  # gate: maximum bytes of shared memory per block
    wide_loads: bool = True  # gate: 16-byte global loads must be present


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: Sequence[Tensor], settings: Mapping[str, Any]
) -> None:
    """Run `kernel` on `tensors`, its first arguments, and on the `settings` that it names."""
    arguments = {name: settings[name] for name in kernel.arg_names[len(tensors) :]}
    arguments["num_warps"] = settings["num_warps"]
    if _recording is not None:
        _recording.append((kernel, {**dict(zip(kernel.arg_names, tensors, strict=False)), **arguments}))
        return
    with torch.cuda.device_of(tensors[0]):
        # the default of enable_fp_fusion is going to change: Triton 3.9 warns where it is not given
        kernel[grid](*tensors, **arguments, enable_fp_fusion=True)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within the block launches are appended to the list and not run."""
    global _recording
    _recording = []
    try:
        yield _recording
    finally:
        _recording = None


def accumulator(x: Tensor) -> Any:
    """Triton's type for the arithmetic on `x`."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def processors(device: torch.device) -> int:
    """Number of multiprocessors: that of an H100 for meta tensors, 2 for Triton's interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 2

"""Which backend runs an op: one decision, made in one place."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Backend", "BackendError", "resolve_backend", "use_backend"]

Backend = Literal["auto", "triton", "torch"]

_BACKENDS = ("auto", "triton", "torch")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OLDEST = (8, 0)  # Ampere: the first whose tensor types include bf16; older cards take the native operators

_auto: Backend = "auto"


class BackendError(RuntimeError):
    """The backend that was asked for by name can't run here."""


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Within the block `backend="auto"` means `backend`: to compare backends, or to run the kernels in Triton's interpreter."""
    global _auto
    if backend not in _BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; use 'auto', 'triton' or 'torch'")
    before, _auto = _auto, backend
    try:
        yield
    finally:
        _auto = before


def resolve_backend(op: str, backend: Backend, x: Tensor) -> Literal["triton", "torch"]:
    """The backend that runs `op` on `x`.

    "auto" takes the kernels on an NVIDIA GPU that has them and native operators everywhere else; a model that is being exported
    always shows standard operators, so that ONNX and torch.export can read it.

    Raises:
        BackendError: "triton" was asked for by name and can't run on `x`.
        ValueError: an unknown backend.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"{op}: unknown backend {backend!r}; use 'auto', 'triton' or 'torch'")
    named = backend if backend != "auto" else _auto
    if named == "torch" or torch.compiler.is_exporting():
        return "torch"
    obstacle = _obstacle(x)
    if obstacle is None and (named == "triton" or x.is_cuda):
        return "triton"
    if named == "triton":
        raise BackendError(
            f"{op}: backend='triton' can't run here: {obstacle}; use backend='auto' or 'torch'"
        )
    return "torch"


def _obstacle(x: Tensor) -> str | None:
    if x.dtype not in _DTYPES:
        return f"x has dtype {x.dtype}, the kernels take float16, bfloat16, float32 and float64"
    return _device_obstacle(x.device.type, x.device.index or 0)


@torch.compiler.assume_constant_result
def _device_obstacle(kind: str, index: int) -> str | None:
    """Why the kernels don't run on a device, or None; asked once per device."""
    key = (kind, index, interpreted())
    if key not in _known_obstacles:
        _known_obstacles[key] = _find_obstacle(kind, index)
    return _known_obstacles[key]


_known_obstacles: dict[tuple[str, int, bool], str | None] = {}


def _find_obstacle(kind: str, index: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if kind == "cpu":
        return (
            None
            if interpreted()
            else "x is on the CPU, where kernels run only in Triton's interpreter (TRITON_INTERPRET=1)"
        )
    if kind != "cuda" or torch.version.hip is not None:
        return f"x is on {'an AMD GPU' if torch.version.hip else kind!r}, the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 or newer"
        )
    return None


def interpreted() -> bool:
    """Whether kernels defined now run in Triton's interpreter instead of on a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"

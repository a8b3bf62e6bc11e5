"""Choice of the backend that runs an op, and of in-place work on a CPU."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .tensors import check_choice

__all__ = [
    "Backend",
    "BackendError",
    "interpreted",
    "is_ordinary",
    "is_plain_memory",
    "resolve_backend",
    "use_backend",
]

Backend = Literal["auto", "triton", "torch"]

_BACKENDS = get_args(Backend)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OLDEST = (8, 0)  # Ampere: the first GPUs with bf16 tensor cores; older ones use the native operators

_auto: Backend = "auto"


class BackendError(RuntimeError):
    """The requested backend cannot run here."""


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Let `backend="auto"` mean `backend` within the block."""
    global _auto
    check_choice("use_backend", "backend", backend, _BACKENDS)
    before, _auto = _auto, backend
    try:
        yield
    finally:
        _auto = before


def resolve_backend(op: str, backend: Backend, x: Tensor) -> Literal["triton", "torch"]:
    """The backend that runs `op` on `x`.

    "auto" chooses the kernels on a supported NVIDIA GPU and native operators everywhere else. An
    exported model always contains standard operators, so that ONNX and torch.export can read it.

    Raises:
        BackendError: "triton" was requested and cannot run on `x`.
        ValueError: an unknown backend.
    """
    check_choice(op, "backend", backend, _BACKENDS)
    named = backend if backend != "auto" else _auto
    if named == "torch" or torch.compiler.is_exporting():
        return "torch"
    obstacle = _obstacle(x)
    if obstacle is None and (named == "triton" or x.is_cuda):
        return "triton"
    if named == "triton":
        raise BackendError(
            f"{op}: backend='triton' cannot run here: {obstacle}; use backend='auto' or 'torch'"
        )
    return "torch"


def _obstacle(x: Tensor) -> str | None:
    if x.dtype not in _DTYPES:
        return f"x has dtype {x.dtype}, the kernels take float16, bfloat16, float32 and float64"
    return _device_obstacle(x.device.type, x.device.index or 0)


@torch.compiler.assume_constant_result
def _device_obstacle(device_type: str, index: int) -> str | None:
    return _find_obstacle(device_type, index, interpreted())


@functools.cache
def _find_obstacle(device_type: str, index: int, in_interpreter: bool) -> str | None:
    """Why the kernels do not run on a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device_type == "cpu":
        where = "x is on the CPU, where kernels run only in Triton's interpreter (TRITON_INTERPRET=1)"
        return None if in_interpreter else where
    if device_type != "cuda" or torch.version.hip is not None:
        found = "an AMD GPU" if torch.version.hip else repr(device_type)
        return f"x is on {found}, the kernels are for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < _OLDEST:
        return f"the GPU has compute capability {major}.{minor}, the kernels need 8.0 or newer"
    return None


def interpreted() -> bool:
    """Whether kernels defined now run in Triton's interpreter instead of on a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary CPU tensors, so that an op may branch on their values.

    False inside compilers, tracers, forward-mode gradients and vmap, and for fake tensors.
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    if forward_ad._current_level >= 0:
        return False
    given = [t for t in tensors if t is not None]
    if any(type(t) not in (Tensor, torch.nn.Parameter) or t.device.type != "cpu" for t in given):
        return False
    try:  # transforms of torch.func wrap tensors that look ordinary but own no memory
        return all(t.untyped_storage().nbytes() >= 0 for t in given)
    except NotImplementedError:
        return False


def is_plain_memory(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary CPU tensors without a gradient to record and without autocast.

    Only then may an op write intermediate results with `out=` and in place.
    """
    if torch.is_autocast_enabled("cpu") or not is_ordinary(*tensors):
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))

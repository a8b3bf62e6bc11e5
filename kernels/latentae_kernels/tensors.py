"""Checks of an op's tensors, their memory formats, and reusable CPU buffers."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "check_channel_vector",
    "check_choice",
    "check_convolution",
    "check_floating",
    "check_like",
    "compute_dtype",
    "dense",
    "empty_output",
    "is_channels_last",
    "like",
    "scratch",
]

HALF = (torch.float16, torch.bfloat16)
_KEPT_BYTES = 2**26


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of an op's arithmetic: fp32, or fp64 for an fp64 input."""
    return torch.promote_types(x.dtype, torch.float32)


def check_floating(op: str, name: str, x: Tensor) -> None:
    """`x` must be a floating-point tensor [N, C, ...]."""
    if not x.is_floating_point():
        raise ValueError(
            f"{op}: {name} has dtype {x.dtype}, expected a floating-point dtype; convert it first"
        )
    if x.ndim < 2:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected [N, C, ...]")


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """`value` must be one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: unknown {name} {value!r}; use {' or '.join(map(repr, choices))}")


def check_channel_vector(op: str, name: str, vector: Tensor | None, x: Tensor) -> None:
    """`vector` must be [C] in the dtype of `x`, or in fp32 if `x` is in half precision."""
    if vector is None:
        return
    if vector.shape != x.shape[1:2]:
        raise ValueError(
            f"{op}: {name} has shape {tuple(vector.shape)}, expected ({x.shape[1]},), one value per channel"
        )
    _check_device(op, name, vector, x)
    allowed = (x.dtype, torch.float32) if x.dtype in HALF else (x.dtype,)
    if vector.dtype not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ValueError(
            f"{op}: {name} has dtype {vector.dtype}, expected {expected} for activations in {x.dtype}"
        )


def check_like(op: str, name: str, other: Tensor | None, x: Tensor) -> None:
    """`other` must have the shape, device and dtype of `x`."""
    if other is None:
        return
    if other.shape != x.shape:
        raise ValueError(f"{op}: {name} has shape {tuple(other.shape)}, expected {tuple(x.shape)}")
    _check_device(op, name, other, x)
    if other.dtype != x.dtype:
        raise ValueError(f"{op}: {name} has dtype {other.dtype}, expected {x.dtype}")


def _check_device(op: str, name: str, other: Tensor, x: Tensor) -> None:
    if other.device != x.device:
        raise ValueError(
            f"{op}: {name} is on {other.device}, expected {x.device} like the activations; move one of them"
        )


def check_convolution(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`x` must be [N, C, H, W], `weight` [C_out, C, 3, 3] and `bias` [C_out]."""
    check_floating(op, "x", x)
    if x.ndim != 4:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected [N, C, H, W]")
    if weight.ndim != 4 or tuple(weight.shape[1:]) != (x.shape[1], 3, 3):
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, expected [C_out, {x.shape[1]}, 3, 3] for this x"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},), "
            "one value per output channel"
        )


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` [N, C, *spatial] is dense and the channel moves fastest."""
    return x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """`x` if it is dense with channels last or first, else a copy (channels_last for images)."""
    if is_channels_last(x) or x.is_contiguous():
        return x
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.ndim, torch.contiguous_format))


def like(x: Tensor, pattern: Tensor) -> Tensor:
    """`x` in the memory format of `pattern`, copied only if it has another."""
    if is_channels_last(pattern):
        return x if is_channels_last(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def empty_output(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """Uninitialized [N, channels, *size] in the memory format of a native convolution of `x`."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty((x.shape[0], channels, *size), dtype=x.dtype, device=x.device, memory_format=layout)


class _Scratch(threading.local):
    """Buffers that a thread reuses: fresh pages cost more than the arithmetic on them."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, elements: int, dtype: torch.dtype) -> Tensor:
        """`elements` uninitialized values, in the same memory per name; above 64 MiB not kept."""
        found = self.kept.get((name, dtype))
        if found is None or found.numel() < elements:
            with torch.inference_mode(False):  # usable in every later mode
                found = torch.empty(elements, dtype=dtype, device="cpu")
            if found.nbytes <= _KEPT_BYTES:
                self.kept[name, dtype] = found
        return found[:elements]


scratch = _Scratch()

"""Checks of arguments that several ops share; each message names the op and the argument."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_channel_vector", "check_choice", "check_floating", "check_like"]


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
        raise ValueError(
            f"{op}: unknown {name} {value!r}; use {' or '.join(repr(choice) for choice in choices)}"
        )


def check_channel_vector(op: str, name: str, vector: Tensor | None, x: Tensor) -> None:
    """`vector` must be [C] beside `x`, in its dtype, or fp32 beside half precision (autocast and FSDP keep parameters so)."""
    if vector is None:
        return
    if vector.ndim != 1 or vector.shape[0] != x.shape[1]:
        raise ValueError(
            f"{op}: {name} has shape {tuple(vector.shape)}, expected ({x.shape[1]},), one value a channel of x"
        )
    if vector.device != x.device:
        raise ValueError(f"{op}: {name} is on {vector.device} and x on {x.device}; move one of them")
    half = x.dtype in (torch.float16, torch.bfloat16)
    if vector.dtype != x.dtype and not (half and vector.dtype == torch.float32):
        raise ValueError(
            f"{op}: {name} has dtype {vector.dtype} beside x in {x.dtype}; expected {x.dtype}{' or torch.float32' if half else ''}"
        )


def check_like(op: str, name: str, other: Tensor | None, x: Tensor) -> None:
    """`other` must have the shape, device and dtype of `x`."""
    if other is None:
        return
    if other.shape != x.shape:
        raise ValueError(f"{op}: {name} has shape {tuple(other.shape)}, expected {tuple(x.shape)}, that of x")
    if other.device != x.device:
        raise ValueError(f"{op}: {name} is on {other.device} and x on {x.device}; move one of them")
    if other.dtype != x.dtype:
        raise ValueError(f"{op}: {name} has dtype {other.dtype}, expected {x.dtype}, that of x")

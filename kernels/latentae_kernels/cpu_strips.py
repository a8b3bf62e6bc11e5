"""What the CPU's strip-wise convolutions share: when they may run, and memory for intermediate results."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .checks import check_floating

__all__ = ["check_convolution", "empty_output", "is_ordinary", "is_plain_memory", "scratch"]

_KEPT = 2**26  # bytes


class _Scratch(threading.local):
    """Buffers that stay for the next call of the same thread: fresh pages cost more than the arithmetic on them."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, elements: int, dtype: torch.dtype) -> Tensor:
        """`elements` uninitialized values; the same memory whenever the name is the same. Over 64 MiB it is not kept."""
        found = self.kept.get((name, dtype))
        if found is None or found.numel() < elements:
            with torch.inference_mode(False):  # usable in every later mode
                found = torch.empty(elements, dtype=dtype, device="cpu")
            if found.nbytes <= _KEPT:
                self.kept[name, dtype] = found
        return found[:elements]


scratch = _Scratch()


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary CPU tensors, outside compilers, tracers, forward-mode gradients, vmap and fake tensors.

    Only then may an op branch on their values.
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
    """Whether all are ordinary CPU tensors, with neither a gradient to record nor autocast.

    Only then may an op write intermediate results with `out=` and in place.
    """
    if torch.is_autocast_enabled("cpu") or not is_ordinary(*tensors):
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def empty_output(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """An uninitialized result [N, channels, *size] in the memory format that a native convolution of `x` would choose."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty((x.shape[0], channels, *size), dtype=x.dtype, device=x.device, memory_format=layout)


def check_convolution(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`x` must be [N, C, H, W] and `weight` a 3x3 convolution's over its channels, with `bias` [C_out]."""
    check_floating(op, "x", x)
    if x.ndim != 4:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected [N, C, H, W]")
    if weight.ndim != 4 or tuple(weight.shape[1:]) != (x.shape[1], 3, 3):
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, expected [C_out, {x.shape[1]}, 3, 3] for this x"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"{op}: bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},), one value an output channel"
        )

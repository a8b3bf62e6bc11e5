"""How activations [N, C, *spatial] lie in memory: dense with channels last, or dense with channels first."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dense", "is_channels_last", "like"]


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` is dense with the channel moving fastest. Where C or the number of pixels is 1 both orders are the same."""
    return x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """`x` itself if it is dense in one of the two orders, else a copy: channels last where torch has that format."""
    if is_channels_last(x) or x.is_contiguous():
        return x
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.ndim, torch.contiguous_format))


def like(x: Tensor, pattern: Tensor) -> Tensor:
    """`x` with the dense order of `pattern`, copied only if it has another."""
    if is_channels_last(pattern):
        return x if is_channels_last(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()

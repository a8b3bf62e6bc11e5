"""Random numbers that are a function of what they are for, so that no generator's state needs saving.

Each sample draws from its own key (purpose, seed, step, position in the global batch), so the numbers depend neither on the number of
processes nor on how a batch is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from latentae.data.order import derive_seed

__all__ = ["keyed_normal", "keyed_uniform"]


def keyed_normal(shape: Sequence[int], seed: int, step: int, first: int, purpose: str = "noise") -> Tensor:
    """Standard normal noise [B, ...] on the CPU; `first` is the position of the first sample in the global batch."""
    noise = torch.empty(tuple(shape))
    for sample, generator in zip(noise, _generators(shape[0], seed, step, first, purpose), strict=True):
        sample.normal_(generator=generator)
    return noise


def keyed_uniform(count: int, seed: int, step: int, first: int, purpose: str) -> Tensor:
    """Numbers [count] in [0, 1) on the CPU, one a sample."""
    return torch.stack([torch.rand((), generator=g) for g in _generators(count, seed, step, first, purpose)])


def _generators(count: int, seed: int, step: int, first: int, purpose: str) -> Iterator[torch.Generator]:
    generator = torch.Generator()
    for index in range(count):
        yield generator.manual_seed(derive_seed(purpose, seed, step, first + index) >> 1)  # torch takes 63 bits

"""Random numbers that are a function of what they are for, so that no generator's state needs saving."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentae.data.order import derive_seed

__all__ = ["keyed_normal"]


def keyed_normal(shape: Sequence[int], seed: int, step: int, first: int) -> Tensor:
    """Standard normal noise [B, ...] on the CPU, each sample from its own key (seed, step, position in the global batch).

    The numbers depend neither on the number of processes nor on how a batch is cut.
    """
    generator = torch.Generator()
    noise = torch.empty(tuple(shape))
    for index in range(shape[0]):
        generator.manual_seed(derive_seed("noise", seed, step, first + index) >> 1)  # torch takes 63 bits
        noise[index].normal_(generator=generator)
    return noise

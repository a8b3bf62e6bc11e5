"""Random numbers that are a function of what they are for, so that no generator's state needs saving."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["key", "keyed_normal"]


def key(*parts: int) -> int:
    """A 63-bit number that depends on all parts."""
    packed = struct.pack(f"<{len(parts)}q", *parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def keyed_normal(shape: Sequence[int], seed: int, step: int, first: int) -> Tensor:
    """Standard normal noise [B, ...] on the CPU, each sample from its own key (seed, step, position in the global batch).

    The numbers depend neither on the number of processes nor on how a batch is cut.
    """
    generator = torch.Generator()
    noise = torch.empty(tuple(shape))
    for index in range(shape[0]):
        generator.manual_seed(key(seed, step, first + index))
        noise[index].normal_(generator=generator)
    return noise

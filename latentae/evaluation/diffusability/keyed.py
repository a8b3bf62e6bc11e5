"""Random numbers as functions of a seed and a name: the same for every order, batch size, device and process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from latentae.keyed import plain_word

__all__ = ["digest", "generator", "normal", "uniform"]


def digest(*words: SupportsIndex | str) -> int:
    """64 bits that depend on all words."""
    text = "\0".join(str(plain_word(word)) for word in words).encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def generator(*words: SupportsIndex | str) -> torch.Generator:
    """torch's generator on the CPU, seeded by all words."""
    return torch.Generator().manual_seed(digest(*words) >> 1)


def uniform(*words: SupportsIndex | str) -> float:
    """A number in [0, 1)."""
    return (digest(*words) >> 11) / 2**53


def normal(names: Sequence[SupportsIndex | str], shape: Sequence[int], *words: SupportsIndex | str) -> Tensor:
    """Standard normal noise, fp32 [len(names), *shape]; each row depends on its own name only."""
    return torch.stack([torch.randn(*shape, generator=generator(*words, name)) for name in names])

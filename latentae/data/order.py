"""Which sample comes when: a function of seed, epoch and the number of readers, and of nothing else.

Each epoch lays the shards end to end in a new order, turns that ring by a random number of samples, and cuts it into as many
runs as there are readers (ranks x workers), whose lengths differ by at most one. So any number of shards serves any number of
readers, every sample is read once, and almost every shard by one reader.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Piece", "derive_seed", "pieces", "share"]


@dataclass(frozen=True)
class Piece:
    """Samples `start` to `stop` (excluded) of a shard, counted among the samples in use."""

    shard: int
    start: int
    stop: int


def derive_seed(*words: int | str) -> int:
    """A 64-bit seed for these words, the same on every machine and run."""
    return int.from_bytes(hashlib.blake2b(repr(words).encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def share(total: int, part: int, parts: int) -> int:
    """How many of `total` samples one of `parts` readers gets in each epoch."""
    return (part + 1) * total // parts - part * total // parts


def pieces(counts: Sequence[int], seed: int, epoch: int, part: int, parts: int) -> list[Piece]:
    """What one reader reads in one epoch, in order.

    Args:
        counts: samples in use in each shard.
        seed: of the run.
        epoch: from 0.
        part: which reader, 0 <= part < parts.
        parts: ranks x workers.
    """
    total = sum(counts)
    if not total:
        return []
    draws = np.random.Philox(key=derive_seed("order", seed, epoch)).random_raw(len(counts) + 1)
    order = [int(shard) for shard in np.argsort(draws[1:], kind="stable")]
    start = part * total // parts + int(draws[0]) % total
    stop = start + share(total, part, parts)
    found = _cut(counts, order, start, min(stop, total)) if start < total else []
    return found + _cut(counts, order, max(start - total, 0), stop - total)


def _cut(counts: Sequence[int], order: Sequence[int], start: int, stop: int) -> list[Piece]:
    """The pieces between two positions of the shards laid end to end in `order`."""
    found, begin = [], 0
    for shard in order:
        low, high = max(start - begin, 0), min(stop - begin, counts[shard])
        if low < high:
            found.append(Piece(shard, low, high))
        begin += counts[shard]
    return found

"""Which samples of a data set training uses, and which of them share batches."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from latentae.data.shard_index import ShardIndex

__all__ = ["Selection", "is_held_out"]

_KEPT = 64  # shards whose row numbers stay in memory


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a sample belongs to the held-out slice: decided by its key alone, so the same in every run and data set."""
    digest = hashlib.blake2b(
        key.encode("utf-8", "surrogateescape"), digest_size=8, key=b"latentae held out"
    ).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


@dataclass(frozen=True)
class Selection:
    """The samples in use of an index, in pools that share batches: one, or one for each aspect-ratio bucket.

    Args:
        index: of the data set.
        held_out: the fraction left out of training, by key; None is nothing.
        buckets: (height, width) of each aspect-ratio bucket in pixels; none is one pool of all samples.
    """

    index: ShardIndex
    held_out: float | None = None
    buckets: tuple[tuple[int, int], ...] = ()
    _cache: OrderedDict[int, list[np.ndarray]] = field(default_factory=OrderedDict, repr=False, compare=False)

    def rows(self, shard: int) -> list[np.ndarray]:
        """For each pool the row numbers in use of one shard, ascending."""
        if shard not in self._cache:
            self._cache[shard] = self._find(shard)
            if len(self._cache) > _KEPT:
                self._cache.popitem(last=False)
        return self._cache[shard]

    def _find(self, shard: int) -> list[np.ndarray]:
        if self.held_out is None and not self.buckets:
            return [np.arange(self.index.shards[shard].samples)]
        table = self.index.table(shard)
        used = np.ones(table.samples, dtype=bool)
        if self.held_out is not None:
            limit = min(int(self.held_out * 2**64), 2**64 - 1)  # an integer: uint64 against float would round
            used = np.asarray(table.key_hash) >= np.uint64(limit)
        if not self.buckets:
            return [np.flatnonzero(used)]
        from latentae.data.buckets import assign_buckets

        bucket = assign_buckets(np.asarray(table.height), np.asarray(table.width), self.buckets)
        bucket = np.maximum(
            bucket, 0
        )  # an image of unknown size is likely a bad one: its turn comes, and it is replaced and listed
        return [np.flatnonzero(used & (bucket == number)) for number in range(len(self.buckets))]

    def counts(self) -> list[list[int]]:
        """For each pool the number of samples in use in each shard."""
        shards = range(len(self.index.shards))
        if self.held_out is None and not self.buckets:
            return [[shard.samples for shard in self.index.shards]]
        found = [[len(rows) for rows in self._find(shard)] for shard in shards]
        return [list(pool) for pool in zip(*found, strict=True)]

"""Which samples training uses: the held-out slice, and aspect-ratio buckets.

A bucket is an image size. All buckets have about the same area, so batches need not be square
(NovelAI 2022; SDXL, appendix I).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latentae.data.shard_index import ShardIndex
from latentae.data.tables import hash_key
from latentae.errors import DataError

__all__ = ["NO_BUCKET", "Bucket", "Selection", "assign_buckets", "default_buckets", "is_held_out"]

Bucket = tuple[int, int]  # height, width

NO_BUCKET = -1  # of an image of unknown size
_CACHED = 64  # shards whose row numbers stay in memory


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a sample belongs to the held-out slice.

    Only the key decides, so every run and data set agrees.
    """
    return hash_key(key) < fraction * 2**64


@dataclass(frozen=True)
class Selection:
    """The samples in use of an index, in pools that share batches: one, or one per bucket.

    Args:
        index: of the data set.
        held_out: fraction left out of training, by key; None leaves out nothing.
        buckets: (height, width) of each aspect-ratio bucket in pixels; empty for one pool of all
            samples.
    """

    index: ShardIndex
    held_out: float | None = None
    buckets: tuple[Bucket, ...] = ()
    _cache: OrderedDict[int, list[np.ndarray]] = field(default_factory=OrderedDict, repr=False, compare=False)

    def rows(self, shard: int) -> list[np.ndarray]:
        """For each pool, the row numbers in use of one shard, ascending."""
        if shard not in self._cache:
            self._cache[shard] = self._find(shard)
            if len(self._cache) > _CACHED:
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
        bucket = assign_buckets(table.height, table.width, self.buckets)
        # An image of unknown size is probably unreadable. It stays in bucket 0, where the loader
        # replaces and lists it.
        bucket = np.maximum(bucket, 0)
        return [np.flatnonzero(used & (bucket == number)) for number in range(len(self.buckets))]

    def counts(self) -> list[list[int]]:
        """For each pool, the number of samples in use in each shard."""
        if self.held_out is None and not self.buckets:
            return [[shard.samples for shard in self.index.shards]]
        found = [[len(rows) for rows in self._find(shard)] for shard in range(len(self.index.shards))]
        return [list(pool) for pool in zip(*found, strict=True)]


def default_buckets(resolution: int, step: int = 64, max_ratio: float = 2.0) -> tuple[Bucket, ...]:
    """Sizes of at most `resolution` x `resolution` pixels, from tallest to widest.

    Each side is a multiple of `step`. For each shorter side, the longer side is the largest that
    keeps to the area; both orientations are listed.

    Args:
        resolution: side of the square bucket in pixels.
        step: of the sides in pixels; a multiple of the autoencoder's downsampling factor.
        max_ratio: largest ratio of the longer to the shorter side.

    Raises:
        DataError: `resolution` is no multiple of `step`, or `max_ratio` is below 1.
    """
    if step < 1 or resolution < step or resolution % step or max_ratio < 1:
        raise DataError(
            f"no buckets for resolution {resolution}, step {step}, largest ratio {max_ratio}; "
            "expected a multiple of the step and a ratio of 1 or more"
        )
    pairs = [(resolution**2 // short // step * step, short) for short in range(step, resolution + step, step)]
    tall = [(long, short) for long, short in pairs if long <= max_ratio * short]
    return (*tall, *((short, long) for long, short in reversed(tall) if short != long))


def assign_buckets(height: ArrayLike, width: ArrayLike, buckets: Sequence[Bucket]) -> NDArray[np.int64]:
    """The bucket of each image: the one with the nearest aspect ratio, by factor.

    Of two equally near buckets the earlier one wins, so the choice is the same on every machine.

    Args:
        height, width: of the upright images in pixels, [N] each; 0 is unknown.
        buckets: (height, width) in pixels, such as those of `default_buckets`.

    Returns:
        Bucket numbers [N]; `NO_BUCKET` where the size is unknown.

    Raises:
        DataError: no buckets, or a bucket without area.
    """
    if not buckets or min(min(bucket) for bucket in buckets) < 1:
        raise DataError(f"buckets are {list(buckets)}; expected (height, width) pairs above zero")
    heights, widths = np.asarray(height, np.float64), np.asarray(width, np.float64)
    known = (heights > 0) & (widths > 0)
    # A bucket's bounds are the geometric means with its neighbors' ratios, so one sorted search
    # finds all buckets.
    ratios = np.array([wide / high for high, wide in buckets])
    order = np.argsort(ratios, kind="stable")
    first = order[np.concatenate([[True], np.diff(ratios[order]) > 0])]  # the earliest of each ratio
    bounds = np.sqrt(ratios[first][1:] * ratios[first][:-1])
    shape = np.divide(widths, heights, out=np.ones_like(heights), where=known)
    low, high = np.searchsorted(bounds, shape, "left"), np.searchsorted(bounds, shape, "right")
    return np.where(known, np.minimum(first[low], first[high]), NO_BUCKET)

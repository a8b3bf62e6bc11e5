"""The verb `order`: which samples training uses (`Selection`), and in which order (`EpochOrder`).

The order is a function of seed, epoch, data set and global batch only.
Shards are cut into slices of consecutive samples. Each epoch joins all slices in a new order and
shuffles the samples inside each slice. The result is a virtual array of N samples, which is never
stored. A global batch of B samples has B lanes, and lane l reads the stretch

    virtual[l * S : (l + 1) * S],   S = N // B steps,
    so that   sample(step, lane) = virtual[lane * S + step].

A batch mixes B distant slices, and a lane reads its slices one after the other. Each process owns
some lanes, so any number of processes that divides B sees the same batches. Resuming needs only the
epoch and the step. The last N - B * S samples are the tail.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latentae.data.options import OrderOptions
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import ShardIndex, load_index
from latentae.data.tables import hash_key
from latentae.errors import DataError
from latentae.keyed import derive_seed, whole_seed
from latentae.options import verb

__all__ = [
    "NO_BUCKET",
    "SLICE_SAMPLES",
    "Bucket",
    "EpochOrder",
    "Listing",
    "Run",
    "Selection",
    "assign_buckets",
    "default_buckets",
    "is_held_out",
    "lane_share",
    "order",
]

Bucket = tuple[int, int]  # height, width

NO_BUCKET = -1  # of an image of unknown size
_CACHED = 64  # shards whose row numbers stay in memory
SLICE_SAMPLES = 64  # a read of a few megabytes; the shuffle mixes B slices at a time


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


def lane_share(lanes: range, part: int, parts: int) -> range:
    """The lanes of one of `parts` readers: consecutive, in numbers that differ by at most one."""
    return lanes[part * len(lanes) // parts : (part + 1) * len(lanes) // parts]


@dataclass(frozen=True)
class Run:
    """Samples of one slice in reading order: row numbers among the samples in use of a shard."""

    shard: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class _Pool:
    """One epoch of samples that share batches: all samples, or those of one aspect-ratio bucket."""

    name: str
    counts: tuple[int, ...]  # samples in use in each shard
    seed: int
    slice_samples: int

    @cached_property
    def _cuts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First slice of each shard (and the total), slices in epoch order, and their starts."""
        counts = np.asarray(self.counts, dtype=np.int64)
        first = np.concatenate(([0], np.cumsum(-(-counts // self.slice_samples))))
        order = _permutation(int(first[-1]), derive_seed("slices", self.seed, self.name))
        shard = np.searchsorted(first, order, side="right") - 1
        number, of = order - first[shard], first[shard + 1] - first[shard]
        lengths = (number + 1) * counts[shard] // of - number * counts[shard] // of
        return first, order, np.concatenate(([0], np.cumsum(lengths)))

    @cached_property
    def samples(self) -> int:
        return sum(self.counts)

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """The virtual array from `start` to `stop` (exclusive), slice by slice."""
        first, order, begins = self._cuts
        position = int(np.searchsorted(begins, start, side="right")) - 1
        while start < stop:
            number = int(order[position])
            shard = int(np.searchsorted(first, number, side="right")) - 1
            begin, end = int(begins[position]), int(begins[position + 1])
            low = (number - int(first[shard])) * self.counts[shard] // int(first[shard + 1] - first[shard])
            inside = low + _permutation(end - begin, derive_seed("slice", self.seed, self.name, number))
            yield Run(shard, tuple(inside[start - begin : min(stop, end) - begin].tolist()))
            start, position = min(stop, end), position + 1


def _permutation(size: int, seed: int) -> np.ndarray:
    """By Philox (Salmon et al. 2011), whose raw stream is the same on all platforms."""
    if not size:
        return np.zeros(0, dtype=np.int64)
    return np.argsort(np.random.Philox(key=seed).random_raw(size), kind="stable")


class EpochOrder:
    """One epoch of one data set.

    Args:
        counts: samples in use in each shard, one list per pool of samples that share batches
            (aspect-ratio buckets).
        seed: of the run.
        epoch: from 0.
        digest: of the data set; another data set has another order.
        batch_size: samples of a global batch.
        pad: fill the tail to complete batches from the next epoch, instead of leaving it out.
        slice_samples: maximum samples per slice.

    Attributes:
        steps: global batches of the epoch.
        tail: samples left out (0 with `pad`).
    """

    def __init__(
        self,
        counts: Sequence[Sequence[int]],
        seed: int,
        epoch: int,
        digest: str,
        batch_size: int,
        pad: bool = False,
        slice_samples: int = SLICE_SAMPLES,
    ) -> None:
        self.batch_size, self.pad = batch_size, pad
        base, following = (derive_seed("order", whole_seed(seed), e, digest) for e in (epoch, epoch + 1))
        pools = [(str(number), tuple(count)) for number, count in enumerate(counts)]
        self._pools = [_Pool(name, count, base, slice_samples) for name, count in pools]
        self._next = [_Pool(name, count, following, slice_samples) for name, count in pools]
        self._full = [pool.samples // batch_size for pool in self._pools]
        left = [pool.samples % batch_size for pool in self._pools]
        padded = [full + (pad and rest > 0) for full, rest in zip(self._full, left, strict=True)]
        self.steps, self.tail = sum(padded), 0 if pad else sum(left)
        # The pool of each step: every pool as often as it has batches, in random order.
        self._deal = np.zeros(0, dtype=np.int16)
        if len(padded) > 1:
            pools = np.repeat(np.arange(len(padded), dtype=np.int16), padded)
            self._deal = pools[_permutation(self.steps, derive_seed("deal", base))]

    def pool_of(self, step: int) -> int:
        """The pool (bucket) of a step's batch."""
        return int(self._deal[step]) if len(self._pools) > 1 else 0

    def lane(self, lane: int, pool: int, start: int = 0) -> Iterator[Run]:
        """Samples of one pool for a lane, from its step `start`: one per step of that pool."""
        full = self._full[pool]
        if start < full:
            yield from self._pools[pool].runs(lane * full + start, (lane + 1) * full)
        rest = self._pools[pool].samples - self.batch_size * full
        if not self.pad or not rest:
            return
        if lane < rest:  # the last batch begins with the tail
            at = self.batch_size * full + lane
            yield from self._pools[pool].runs(at, at + 1)
        else:  # then the first samples of the next epoch's lanes, or of its array without full batches
            at = lane * full if full else lane % self._next[pool].samples
            yield from self._next[pool].runs(at, at + 1)

    def spare(self, pool: int, draw: int) -> tuple[int, int]:
        """Shard and row of the sample that replaces an unreadable one. `draw` is any number."""
        at = draw % self._pools[pool].samples
        run = next(self._pools[pool].runs(at, at + 1))
        return run.shard, run.rows[0]

    def done(self, step: int) -> list[int]:
        """How many of the first `step` steps each pool had: the positions of its lanes."""
        if len(self._pools) == 1:
            return [step]
        return np.bincount(self._deal[:step], minlength=len(self._pools)).tolist()


@dataclass(frozen=True)
class Listing:
    """The samples of some steps of one rank.

    Iterating gives (step, key): step by step, counted from the epoch's start, and lane by lane
    inside a step.
    """

    selection: Selection
    epoch_order: EpochOrder
    lanes: tuple[int, ...]
    start: int
    stop: int

    @property
    def steps(self) -> int:
        """Global batches of the complete epoch."""
        return self.epoch_order.steps

    @property
    def tail(self) -> int:
        """Samples that the epoch leaves out."""
        return self.epoch_order.tail

    def __iter__(self) -> Iterator[tuple[int, str]]:
        readers = [self._keys(lane) for lane in self.lanes]
        for step in range(self.start, self.stop):
            for reader in readers:
                yield step, next(reader)

    def _keys(self, lane: int) -> Iterator[str]:
        for run in self.epoch_order.lane(lane, 0, self.start):
            table = self.selection.index.table(run.shard)
            for row in self.selection.rows(run.shard)[0][np.array(run.rows)].tolist():
                yield table.key(row)


@verb(OrderOptions)
def order(options: OrderOptions) -> Listing:
    """List which samples one rank gets in which step of an epoch. No image is read.

    The order is that of `latentae train` with the same seed, data and global batch, for any number
    of ranks and workers.

    Raises:
        DataError: ranks that do not divide the batch, fewer samples than one batch, or a start
            outside the epoch.
    """
    batch, ranks, rank = options.global_batch, options.world_size, options.rank
    if rank >= ranks or batch % ranks:
        expected = "expected a batch that the ranks divide, and a rank from 0 to world size - 1"
        raise DataError(f"global batch {batch}, rank {rank} of {ranks}: {expected}")
    selection = Selection(load_index(expand_shards(options.shards), options.index), options.held_out or None)
    counts = selection.counts()
    digest = selection.index.digest
    epoch_order = EpochOrder(counts, options.seed, options.epoch, digest, batch, options.pad)
    steps = epoch_order.steps
    if not steps:
        found = f"found {sum(counts[0])} samples in {options.shards}"
        raise DataError(f"{found}, but one batch takes {batch}; lower the global batch")
    if options.start > steps:
        raise DataError(f"start {options.start} is outside the epoch, which has steps 0 to {steps - 1}")
    each = batch // ranks
    stop = steps if options.limit is None else min(options.start + max(options.limit, 0), steps)
    return Listing(selection, epoch_order, tuple(range(rank * each, (rank + 1) * each)), options.start, stop)

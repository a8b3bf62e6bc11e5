"""The verb `order` and the data order: a function of seed, epoch, data set and global batch only.

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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from latentae.data.options import OrderOptions
from latentae.data.selection import Selection
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import load_index
from latentae.errors import DataError
from latentae.keyed import derive_seed, whole_seed
from latentae.options import verb

__all__ = ["SLICE_SAMPLES", "EpochOrder", "Listing", "Run", "lane_share", "order"]

SLICE_SAMPLES = 64  # a read of a few megabytes; the shuffle mixes B slices at a time


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

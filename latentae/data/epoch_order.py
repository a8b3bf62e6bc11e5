"""Which sample comes when: a pure function of seed, epoch, data set and global batch.

Shards are cut into slices of consecutive samples. Each epoch lays all slices end to end in a new order, every slice shuffled inside
itself: a virtual array of N samples, which is never made. A global batch of B samples has B lanes, and lane l reads the stretch

    virtual[l * S : (l + 1) * S],   S = N // B steps,   so that   sample(step, lane) = virtual[lane * S + step].

A batch mixes B distant slices, a lane reads its slices one after the other, and any number of processes that divides B sees the same
batches: a process owns lanes. To stop and go on takes the epoch and the step, nothing else. The last N - B * S samples are the tail.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from latentae.keyed import derive_seed, whole_seed

__all__ = [
    "SLICE_SAMPLES",
    "EpochOrder",
    "Run",
    "lane_share",
]

SLICE_SAMPLES = 64  # one read of some megabytes; B lanes of it are the reach of the shuffle


def lane_share(lanes: range, part: int, parts: int) -> range:
    """The lanes of one of `parts` readers: consecutive, in numbers that differ by at most one."""
    return lanes[part * len(lanes) // parts : (part + 1) * len(lanes) // parts]


@dataclass(frozen=True)
class Run:
    """Samples of one slice, in the order in which a lane wants them: row numbers among the samples in use of a shard."""

    shard: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class _Pool:
    """Samples that share batches: all of them, or those of one aspect-ratio bucket."""

    name: str
    counts: tuple[int, ...]  # samples in use in each shard
    seed: int
    slice_samples: int

    @cached_property
    def _cuts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First slice of each shard (and the total), slices in epoch order, and where each begins in the virtual array."""
        counts = np.asarray(self.counts, dtype=np.int64)
        slices = -(-counts // self.slice_samples)
        first = np.concatenate(([0], np.cumsum(slices)))
        order = _permutation(int(first[-1]), derive_seed("slices", self.seed, self.name))
        begins = np.concatenate(([0], np.cumsum(self._lengths(order, first, counts))))
        return first, order, begins

    @staticmethod
    def _lengths(slices: np.ndarray, first: np.ndarray, counts: np.ndarray) -> np.ndarray:
        shard = np.searchsorted(first, slices, side="right") - 1
        number, of = slices - first[shard], first[shard + 1] - first[shard]
        return (number + 1) * counts[shard] // of - number * counts[shard] // of

    @property
    def samples(self) -> int:
        return sum(self.counts)

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """The virtual array from `start` to `stop` (excluded), slice by slice."""
        first, order, begins = self._cuts
        place = int(np.searchsorted(begins, start, side="right")) - 1
        while start < stop:
            number = int(order[place])
            shard = int(np.searchsorted(first, number, side="right")) - 1
            of, number = int(first[shard + 1] - first[shard]), number - int(first[shard])
            low = number * self.counts[shard] // of
            begin, end = int(begins[place]), int(begins[place + 1])
            inside = low + _permutation(
                end - begin, derive_seed("slice", self.seed, self.name, int(order[place]))
            )
            yield Run(shard, tuple(inside[start - begin : min(stop, end) - begin].tolist()))
            start, place = min(stop, end), place + 1


def _permutation(size: int, seed: int) -> np.ndarray:
    """Counter-based: Philox' raw stream is fixed across platforms and NumPy versions (Salmon et al. 2011)."""
    return (
        np.argsort(np.random.Philox(key=seed).random_raw(size), kind="stable")
        if size
        else np.zeros(0, dtype=np.int64)
    )


class EpochOrder:
    """One epoch of one data set.

    Args:
        counts: samples in use in each shard, one such list for each pool of samples that share batches (aspect-ratio buckets).
        seed: of the run.
        epoch: from 0.
        digest: of the data set; another set has another order.
        batch_size: samples of a global batch.
        pad: fill the tail to whole batches from the next epoch, rather than leave it out.
        slice_samples: at most so many samples in a slice.

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
        self.batch_size, self.pad, seed = batch_size, pad, whole_seed(seed)
        base = derive_seed("order", seed, epoch, digest)
        following = derive_seed("order", seed, epoch + 1, digest)
        names = [str(number) for number in range(len(counts))]
        self._pools = [_Pool(n, tuple(c), base, slice_samples) for n, c in zip(names, counts, strict=True)]
        self._next = [
            _Pool(n, tuple(c), following, slice_samples) for n, c in zip(names, counts, strict=True)
        ]
        self._full = [pool.samples // batch_size for pool in self._pools]
        left = [pool.samples % batch_size for pool in self._pools]
        padded = [full + (pad and rest > 0) for full, rest in zip(self._full, left, strict=True)]
        self.steps, self.tail = sum(padded), 0 if pad else sum(left)
        self._deal = _deal(padded, derive_seed("deal", base))

    def pool_of(self, step: int) -> int:
        """Which pool (bucket) the batch of a step is from."""
        return int(self._deal[step]) if len(self._pools) > 1 else 0

    def lane(self, lane: int, pool: int, start: int = 0) -> Iterator[Run]:
        """What a lane reads of one pool, from its own step `start` on: one sample for each step dealt to that pool."""
        full = self._full[pool]
        if start < full:
            yield from self._pools[pool].runs(lane * full + start, (lane + 1) * full)
        rest = self._pools[pool].samples - self.batch_size * full
        if not self.pad or not rest:
            return
        if lane < rest:  # the last batch begins with the tail
            at = self.batch_size * full + lane
            yield from self._pools[pool].runs(at, at + 1)
        else:  # and goes on with what the next epoch's lanes begin with, or with its whole array where the pool has no full batch
            at = lane * full if full else lane % self._next[pool].samples
            yield from self._next[pool].runs(at, at + 1)

    def spare(self, pool: int, draw: int) -> tuple[int, int]:
        """Shard and row of some sample of a pool: what takes the place of one that can't be read. `draw` is any number."""
        at = draw % self._pools[pool].samples
        run = next(self._pools[pool].runs(at, at + 1))
        return run.shard, run.rows[0]

    def done(self, step: int) -> list[int]:
        """How many of the first `step` steps each pool has had: where its lanes stand."""
        if len(self._pools) == 1:
            return [step]
        return np.bincount(self._deal[:step], minlength=len(self._pools)).tolist()


def _deal(steps: Sequence[int], seed: int) -> np.ndarray:
    """The pool of each step: every pool as often as it has batches, in random order."""
    if len(steps) == 1:
        return np.zeros(0, dtype=np.int16)
    return np.repeat(np.arange(len(steps), dtype=np.int16), steps)[_permutation(sum(steps), seed)]

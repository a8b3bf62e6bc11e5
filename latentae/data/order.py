"""The verb `order`: which sample is in which step of an epoch, without reading an image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentae.data.epoch_order import EpochOrder, lane_share, run_seed
from latentae.data.selection import Selection
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import load_index
from latentae.errors import DataError

__all__ = ["Listing", "order"]


@dataclass(frozen=True)
class Listing:
    """The samples of some steps of one rank.

    Iterating gives (step, key): step by step, absolute within the epoch, and inside a step lane by lane.
    """

    selection: Selection
    epoch_order: EpochOrder
    lanes: tuple[range, ...]  # of each worker
    start: int
    stop: int

    @property
    def steps(self) -> int:
        """Global batches of the whole epoch."""
        return self.epoch_order.steps

    @property
    def tail(self) -> int:
        """Samples that the epoch leaves out."""
        return self.epoch_order.tail

    def __iter__(self) -> Iterator[tuple[int, str]]:
        readers = {lane: self._keys(lane) for lanes in self.lanes for lane in lanes}
        for step in range(self.start, self.stop):
            for lanes in self.lanes:
                for lane in lanes:
                    yield step, next(readers[lane])

    def _keys(self, lane: int) -> Iterator[str]:
        for run in self.epoch_order.lane(lane, 0, self.start):
            table = self.selection.index.table(run.shard)
            for row in self.selection.rows(run.shard)[0][np.array(run.rows)].tolist():
                yield table.key(row)


def order(
    shards: str | Path,
    *,
    seed: int = 0,
    epoch: int = 0,
    global_batch: int = 16,
    world_size: int = 1,
    rank: int = 0,
    workers: int = 0,
    start: int = 0,
    limit: int | None = None,
    pad: bool = False,
    held_out: float = 0.0,
    index: str | Path | None = None,
) -> Listing:
    """Which samples one rank gets in which step of an epoch; nothing is decoded.

    The order is that of `latentae train` with the same seed, data and global batch, whatever the numbers of ranks and workers.

    Args:
        shards: folder, file, glob, brace pattern or URL.
        seed: of the run.
        epoch: from 0.
        global_batch: samples of a step over all ranks.
        world_size, rank: whose share to list; `global_batch` must be a multiple of `world_size`.
        workers: data workers of the rank; they change who reads, not what comes.
        start: first step, absolute within the epoch.
        limit: at most so many steps.
        pad: fill the last batch from the next epoch.
        held_out: the fraction left out of training (data.validation_fraction with validation "auto", which is 0.02 unless set).
        index: folder of the shards' indexes, where they are not beside the shards.

    Raises:
        DataError: ranks that do not divide the batch, fewer samples than one batch, or a start outside the epoch.
    """
    if not 0 <= rank < world_size or global_batch < 1 or global_batch % world_size or workers < 0:
        raise DataError(
            f"global batch {global_batch}, rank {rank} of {world_size}, {workers} workers: expected a batch that the ranks divide, "
            "a rank from 0 to world size - 1 and 0 or more workers"
        )
    seed = run_seed(seed)
    selection = Selection(load_index(expand_shards(shards), index), held_out or None)
    counts = selection.counts()
    epoch_order = EpochOrder(counts, seed, epoch, selection.index.digest, global_batch, pad)
    if not epoch_order.steps:
        raise DataError(
            f"found {sum(counts[0])} samples in {shards}, but one batch takes {global_batch}; lower the global batch"
        )
    if not 0 <= start <= epoch_order.steps:
        raise DataError(f"start {start} is outside the epoch, which has steps 0 to {epoch_order.steps - 1}")
    each = global_batch // world_size
    own, readers = range(rank * each, (rank + 1) * each), max(min(workers, each), 1)
    lanes = tuple(lane_share(own, worker, readers) for worker in range(readers))
    stop = epoch_order.steps if limit is None else min(start + max(limit, 0), epoch_order.steps)
    return Listing(selection, epoch_order, lanes, start, stop)

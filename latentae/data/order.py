"""The verb `order`: which sample is in which step of an epoch, without reading an image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from latentae.data.epoch_order import EpochOrder, lane_share
from latentae.data.options import OrderOptions
from latentae.data.selection import Selection
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import load_index
from latentae.errors import DataError
from latentae.options import verb

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


@verb(OrderOptions)
def order(options: OrderOptions) -> Listing:
    """Which samples one rank gets in which step of an epoch; nothing is decoded.

    The order is that of `latentae train` with the same seed, data and global batch, whatever the numbers of ranks and workers.

    Raises:
        DataError: ranks that do not divide the batch, fewer samples than one batch, or a start outside the epoch.
    """
    if (
        not 0 <= options.rank < options.world_size
        or options.global_batch < 1
        or options.global_batch % options.world_size
        or options.workers < 0
    ):
        raise DataError(
            f"global batch {options.global_batch}, rank {options.rank} of {options.world_size}, {options.workers} workers: "
            "expected a batch that the ranks divide, "
            "a rank from 0 to world size - 1 and 0 or more workers"
        )
    selection = Selection(load_index(expand_shards(options.shards), options.index), options.held_out or None)
    counts = selection.counts()
    epoch_order = EpochOrder(
        counts, options.seed, options.epoch, selection.index.digest, options.global_batch, options.pad
    )
    if not epoch_order.steps:
        raise DataError(
            f"found {sum(counts[0])} samples in {options.shards}, but one batch takes {options.global_batch}; lower the global batch"
        )
    if not 0 <= options.start <= epoch_order.steps:
        raise DataError(
            f"start {options.start} is outside the epoch, which has steps 0 to {epoch_order.steps - 1}"
        )
    each = options.global_batch // options.world_size
    own, readers = range(options.rank * each, (options.rank + 1) * each), max(min(options.workers, each), 1)
    lanes = tuple(lane_share(own, worker, readers) for worker in range(readers))
    stop = (
        epoch_order.steps
        if options.limit is None
        else min(options.start + max(options.limit, 0), epoch_order.steps)
    )
    return Listing(selection, epoch_order, lanes, options.start, stop)

"""How an evaluation is cut into chunks that several processes share, and that a crash leaves in place.

The cut depends on the number of images alone. Each chunk becomes one file; whichever process finds all of them in place merges them in
their order, so the numbers are the same for one process and for many, and for a run that was interrupted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from latentae.data.shard_files import RawSample, read_samples
from latentae.data.shard_index import ShardIndex
from latentae.evaluation.part import Part

__all__ = ["PartsFolder", "cut", "samples_at", "spread"]

CHUNKS, GRAIN = 32, 16  # at most so many, of a multiple of so many images


def cut(total: int) -> list[range]:
    """Positions 0 to `total` in at most 32 chunks, of a multiple of 16 images but for the last."""
    size = GRAIN * max(-(-total // (CHUNKS * GRAIN)), 1)
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` positions spread evenly over `count` images, first and last included."""
    wanted = min(wanted, count)
    return [round(index * (count - 1) / max(wanted - 1, 1)) for index in range(wanted)]


def samples_at(index: ShardIndex, positions: Sequence[int]) -> Iterator[tuple[int, RawSample]]:
    """(position, sample) at these positions, counted through the shards in order; nothing else is read.

    Args:
        index: the shards.
        positions: in ascending order.

    Raises:
        ShardError: a shard can't be read, or has changed since it was indexed.
    """
    start, rest = 0, list(positions)
    for number, entry in enumerate(index.shards):
        here = list(itertools.takewhile(lambda position, stop=start + entry.samples: position < stop, rest))
        yield from zip(
            here, read_samples(index, number, [position - start for position in here]), strict=True
        )
        rest, start = rest[len(here) :], start + entry.samples


class PartsFolder:
    """The chunks of one evaluation, each a file once it is measured.

    Args:
        folder: where the files lie; made if it is not there.
        total: images in all.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.chunks = folder, cut(total)
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, number: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"{number:03}.npz"

    def share(self, task: int, tasks: int) -> list[int]:
        """Chunks of one of `tasks` processes that are not in place yet."""
        return [number for number in range(task, len(self.chunks), tasks) if not self.path(number).is_file()]

    def complete(self) -> bool:
        """Whether every chunk is in place."""
        return all(self.path(number).is_file() for number in range(len(self.chunks)))

    def parts(self) -> Iterator[Part]:
        """The chunks in order, one in memory at a time."""
        for number in range(len(self.chunks)):
            yield Part.load(self.path(number))

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether this process is the one to finish: the lock is the system's, so it goes with a process that dies.

        False also where another process has finished and cleared the folder away.
        """
        if not self.folder.is_dir():
            yield False
            return
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(blocking=False)
        except (Timeout, FileNotFoundError):
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

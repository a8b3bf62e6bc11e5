"""Stages that run in parallel, in order and with bounded queues; threads end with their block.

A stage is a function from an iterator to an iterator. With a `Crew` of threads it runs in parallel
with the other stages; without threads the same functions run one by one, so the results do not
depend on the number of workers. Threads suffice because decoding, resizing, hashing and network
access release Python's lock, and images need no copy.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Barrier, Event, Thread
from typing import Any, TypeVar

import torch

__all__ = ["Crew", "default_workers"]

_POLL = 0.1  # seconds between checks for a stop while a queue is full or empty
_PATIENCE = 10.0  # seconds to wait for a thread to end; one blocked on the network must not delay Ctrl-C
_A = TypeVar("_A")
_B = TypeVar("_B")


def default_workers(device: torch.device) -> int:
    """Decoding threads: one if the network computes on the CPU, else one per core, at most 16."""
    return 1 if device.type == "cpu" else min(os.cpu_count() or 1, 16)


class _Stopped(Exception):
    """The block of the crew was left."""


class _End:
    """The last item of a queue, with the error that ended it."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def reraise(self) -> None:
        if self.error is not None:
            raise self.error


class Crew:
    """`with Crew(workers) as crew`: threads that end with the block, however it is left.

    Args:
        workers: threads for `map`. With 0 everything runs in the caller's thread.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._stop = Event()
        self._threads: list[Thread] = []
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Crew:
        if self.workers:
            self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="latentae-decode")
            self._one_core_each(self._pool)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for thread in self._threads:
            thread.join(_PATIENCE)

    def _one_core_each(self, pool: ThreadPoolExecutor) -> None:
        """Keep torch from starting several threads in each worker, as it would for a resize."""
        threads, started = torch.get_num_threads(), Barrier(self.workers)

        def begin() -> None:
            torch.get_num_threads()  # torch resets a thread's number at its first use
            torch.set_num_threads(1)
            started.wait()  # so that each worker takes one of these calls

        for future in [pool.submit(begin) for _ in range(self.workers)]:
            future.result()
        torch.set_num_threads(threads)  # the workers' calls changed the default of later threads

    def map(self, function: Callable[[_A], _B], items: Iterator[_A], window: int) -> Iterator[_B]:
        """`function` of each item, in order, computed by workers up to `window` items ahead."""
        if self._pool is None:
            yield from map(function, items)
            return
        pending: deque[Future[_B]] = deque()
        for item in items:
            if self._stop.is_set():
                return
            pending.append(self._pool.submit(function, item))
            if len(pending) > window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def ahead(self, items: Iterator[_A], depth: int) -> Iterator[_A]:
        """The same items, produced by another thread up to `depth` items ahead."""
        if not self.workers:
            yield from items
            return
        queue: Queue[Any] = Queue(depth)
        self._start("latentae-read", queue, items)
        yield from _drain(queue)

    def behind(
        self, consume: Callable[[Iterator[_A]], Iterator[_B]], items: Iterator[_A], depth: int
    ) -> Iterator[_B]:
        """The results of `consume(items)`. Items are produced here and consumed in another thread.

        The thread is up to `depth` items behind. If producing an item fails, `consume` gets all
        items before it and then the error, which is raised here once `consume` has ended.
        """
        if not self.workers:
            yield from consume(items)
            return
        queue: Queue[Any] = Queue(depth)
        results: Queue[Any] = Queue()
        writer = self._start("latentae-write", results, consume(self._taken(queue)))
        cause: Exception | None = None
        try:
            for item in items:
                self._put(queue, item, writer)
                while not results.empty() and not isinstance(results.queue[0], _End):
                    yield results.get()
        except _Stopped:  # the consumer ended early; `results` has the reason
            pass
        except Exception as error:
            cause = error
        with suppress(_Stopped):
            self._put(queue, _End(cause), writer)
        yield from _drain(results)

    def _start(self, name: str, queue: Queue[Any], items: Iterator[Any]) -> Thread:
        """Start a thread that puts all items into the queue, then the end."""

        def run() -> None:
            error: BaseException | None = None
            try:
                for item in items:
                    self._put(queue, item)
            except BaseException as caught:
                error = caught
            with suppress(_Stopped):
                self._put(queue, _End(error))

        thread = Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _put(self, queue: Queue[Any], item: Any, reader: Thread | None = None) -> None:
        while not self._stop.is_set() and (reader is None or reader.is_alive()):
            try:
                return queue.put(item, timeout=_POLL)
            except Full:
                continue
        raise _Stopped

    def _taken(self, queue: Queue[Any]) -> Iterator[Any]:
        while not self._stop.is_set():
            try:
                item = queue.get(timeout=_POLL)
            except Empty:
                continue
            if isinstance(item, _End):
                return item.reraise()
            yield item
        raise _Stopped


def _drain(queue: Queue[Any]) -> Iterator[Any]:
    while not isinstance(item := queue.get(), _End):
        yield item
    item.reraise()

"""Work that goes on side by side: each stage ahead of the next by a few items, in order, and nothing left running at the end.

A stage is a function from an iterator to an iterator. With a `Crew` of threads it runs beside its neighbours; without threads the
same functions are pulled one by one, so what comes out can't depend on the number of workers. Threads rather than processes, since
decoding, resizing, hashing and the network all let go of Python's lock and images need no copy.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, Full, Queue
from threading import Barrier, Event, Thread
from types import TracebackType
from typing import Any, TypeVar

import torch

__all__ = ["Crew", "default_workers"]

MOST_WORKERS = 16  # decoding more at once helps no GPU that we know
_POLL = 0.1  # seconds between looks at whether to stop, while a neighbour keeps a thread waiting
_PATIENCE = 10.0  # seconds to wait for a thread to end; one that hangs on the network must not hold up Ctrl-C
_A = TypeVar("_A")
_B = TypeVar("_B")


def default_workers(device: torch.device) -> int:
    """Threads that decode: one where the network computes on the CPU too, which it keeps busy; else one for each core, up to 16."""
    return 1 if device.type == "cpu" else min(os.cpu_count() or 1, MOST_WORKERS)


class _Stopped(Exception):
    """The job ended while a thread was still at work."""


class _End:
    """No item follows; with an error, because of it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Crew:
    """`with Crew(workers) as crew`: threads that are gone when the block is left, whatever the reason.

    Args:
        workers: threads for `map`; with 0 nothing runs in any other thread.
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for thread in self._threads:
            thread.join(_PATIENCE)

    def _one_core_each(self, pool: ThreadPoolExecutor) -> None:
        """Each worker is one of many: torch must not start a team of threads for each of them, as it would to resize an image."""
        threads, started = torch.get_num_threads(), Barrier(self.workers)

        def begin() -> None:
            torch.get_num_threads()  # torch sets the number of a thread at its first use, which must not come after the next line
            torch.set_num_threads(1)
            started.wait()  # so that every worker takes one of these

        for future in [pool.submit(begin) for _ in range(self.workers)]:
            future.result()
        torch.set_num_threads(
            threads
        )  # the workers' calls set what later threads of this process would begin with

    def map(self, function: Callable[[_A], _B], items: Iterator[_A], window: int) -> Iterator[_B]:
        """`function` of each item in order, computed by the workers for up to `window` items ahead."""
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
        """The same items, made in a thread of their own, which is up to `depth` of them ahead."""
        if not self.workers:
            yield from items
            return
        queue: Queue[Any] = Queue(depth)

        def run() -> None:
            try:
                for item in items:
                    self._put(queue, item)
                self._put(queue, _End())
            except _Stopped:
                pass
            except BaseException as error:
                self._tell(queue, error)

        self._start(run, "latentae-read")
        while not isinstance(item := queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error

    def behind(
        self, consume: Callable[[Iterator[_A]], Iterator[_B]], items: Iterator[_A], depth: int
    ) -> Iterator[_B]:
        """What `consume(items)` gives, where items are made here and `consume` runs in a thread, up to `depth` of them behind.

        When making an item fails, `consume` gets all before it and then the error, which is raised here once it has ended.
        """
        if not self.workers:
            yield from consume(items)
            return
        queue: Queue[Any] = Queue(depth)
        results: Queue[Any] = Queue()

        def run() -> None:
            try:
                for result in consume(self._taken(queue)):
                    results.put(result)
                results.put(_End())
            except BaseException as error:
                results.put(_End(error))

        writer = self._start(run, "latentae-write")
        cause: Exception | None = None
        try:
            for item in items:
                self._put(queue, item, writer)
                while not results.empty() and not isinstance(results.queue[0], _End):
                    yield results.get()
        except _Stopped:  # the writer has ended before its time, and has said why
            pass
        except Exception as error:
            cause = error
        self._tell(queue, cause, writer)
        while not isinstance(result := results.get(), _End):
            yield result
        if result.error is not None:
            raise result.error

    def _start(self, run: Callable[[], None], name: str) -> Thread:
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

    def _tell(self, queue: Queue[Any], error: BaseException | None, reader: Thread | None = None) -> None:
        try:
            self._put(queue, _End(error), reader)
        except _Stopped:
            return

    def _taken(self, queue: Queue[Any]) -> Iterator[Any]:
        while not self._stop.is_set():
            try:
                item = queue.get(timeout=_POLL)
            except Empty:
                continue
            if not isinstance(item, _End):
                yield item
            elif item.error is None:
                return
            else:
                raise item.error
        raise _Stopped

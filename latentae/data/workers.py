"""What data workers do with signals and with shared memory."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

from latentae.errors import DataError

__all__ = ["end_workers", "leave_signals_to_parent", "share"]


def leave_signals_to_parent(worker: int) -> None:
    """For DataLoader's `worker_init_fn`: a scheduler signals every process of a job, but the run must finish its step and save.

    PyTorch's workers die of SIGTERM, which raises an error in the trainer wherever it is. Here the first SIGTERM is left to the parent;
    the second one, DataLoader's own way to be rid of a worker that does not end, is obeyed.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: _obey_next(number))


def _obey_next(number: int) -> None:
    signal.signal(number, lambda number, frame: os._exit(0))


def end_workers(batches: Iterator[Any]) -> None:
    """End the workers of a DataLoader's iterator now.

    Otherwise a process can hang at its end: a traceback keeps the iterator alive, and workers ignore the first SIGTERM.
    """
    shut_down = getattr(batches, "_shutdown_workers", None)  # torch has no public name for it
    if shut_down is not None:
        shut_down()


def share(images: Tensor) -> Tensor:
    """In a data worker, move images to shared memory; in any other process, return them unchanged.

    torch would do this in a thread whose errors are lost, and the parent would wait forever.

    Raises:
        DataError: shared memory is too small, as in containers with a small /dev/shm.
    """
    if get_worker_info() is None:
        return images
    try:
        return images.share_memory_()
    except (RuntimeError, OSError) as error:
        size = images.numel() * images.element_size() / 1e6
        raise DataError(
            f"a data worker found no room for a batch of {size:.2g} MB in shared memory ({str(error).splitlines()[0]}); give the "
            "container more (docker run --shm-size=8g) or set data.workers to 0"
        ) from error

"""What data workers do with signals."""

from __future__ import annotations

import os
import signal

__all__ = ["leave_signals_to_parent"]


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

"""Functions in separate processes, forked from a server with loaded libraries."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["latentae.cli", "latentae.training.dry_run", "latentae.training.train", "accelerate", "pytest", "timm"]
)
HOST = "127.0.0.1"


class Processes:
    """Processes that call one function; several of them find each other as those of a launcher do.

    Args:
        folder: where each process writes a log of its output.
        function: of a module, called with `arguments`; an exit code is left by `sys.exit`.
        count: number of processes.
    """

    def __init__(
        self, folder: Path, function: Callable[..., object], *arguments: Any, count: int = 1
    ) -> None:
        self.folder = folder
        environments: list[dict[str, str]] = [{}]
        if count > 1:  # the parent keeps the store, as torchrun does, so no port is free for a moment only
            self.store = torch.distributed.TCPStore(
                HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=1)
            )
            shared = {
                "WORLD_SIZE": count,
                "LOCAL_WORLD_SIZE": count,
                "MASTER_ADDR": HOST,
                "MASTER_PORT": self.store.port,
            }
            shared |= {"TORCHELASTIC_USE_AGENT_STORE": True}
            ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
            environments = [{name: str(value) for name, value in rank.items()} for rank in ranks]
        self.all: list[BaseProcess] = [
            CONTEXT.Process(target=_call, args=(self._log(rank), environment, function, arguments))
            for rank, environment in enumerate(environments)
        ]
        for process in self.all:
            process.start()

    def _log(self, rank: int) -> Path:
        return self.folder / f"output of {rank}.log"

    def output(self, rank: int = 0) -> str:
        """What a process has written to stdout and stderr.

        Of processes in the same folder, one after the other.
        """
        return self._log(rank).read_text() if self._log(rank).exists() else ""

    def wait(self, timeout: float = 300) -> list[int]:
        """Exit codes once all have ended; a process that has not by then is killed."""
        end = time.monotonic() + timeout
        for process in self.all:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
        return [process.exitcode or 0 for process in self.all]


def _call(
    log: Path, environment: dict[str, str], function: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    gc.freeze()  # what is shared with the server is neither examined nor copied
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)

"""Processes and devices: the Accelerator, shared decisions, and the loss of a process."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from latentae.errors import LatentAEError, TrainingError
from latentae.progress import say

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "agree",
    "build_accelerator",
    "close_accelerator",
    "launched",
    "mean_over_processes",
    "on_main",
]

T = TypeVar("T")

# Longest time that processes wait for one that works alone, such as on a validation or a copy of a
# checkpoint.
TIMEOUT = timedelta(minutes=30)

# Seconds after which a process logs that it waits for others.
PATIENCE = 5.0

_SHARDED = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}

# Messages of gloo when another process is gone or silent; those of a bug, such as different shapes,
# do not match.
_LOST = re.compile(
    r"closed by (remote )?peer|connection (was )?(closed|reset|refused|aborted)|broken pipe|"
    r"socket closed|pair closure|timed out|read error|remote process exited|communicator was aborted",
    re.IGNORECASE,
)


def build_accelerator(precision: str) -> Accelerator:
    """The Accelerator of this process, under `accelerate launch`, torchrun or nothing.

    Raises:
        TrainingError: the launcher shards models (FSDP, DeepSpeed, Megatron-LM), or its processes
            do not find each other.
    """
    for key, name in _SHARDED.items():
        if os.environ.get(f"ACCELERATE_USE_{key}", "false").lower() in ("true", "1", "yes"):
            raise TrainingError(
                f"the launcher requests {name}, which shards one model, but latentae trains two "
                "(autoencoder and discriminator) that fit on one device; start with torchrun, "
                "or `accelerate launch --multi_gpu`"
            )
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    gpu = torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Without cpu=True every CPU process under torchrun would train alone, all in the same folder.
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    advice = "start with `accelerate launch -m latentae train ...` or `torchrun -m latentae train ...`"
    try:
        with _announce_waiting(world_size):
            accelerator = Accelerator(
                cpu=not gpu and not torch.backends.mps.is_available(),
                mixed_precision="bf16" if precision == "bf16" else "no",
                kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
            )
    except ValueError as error:
        raise TrainingError(
            f"the launcher's environment lacks the address for {world_size} processes ({error}); {advice}"
        ) from error
    if world_size != accelerator.num_processes:
        raise TrainingError(
            f"the launcher started {world_size} processes, but Accelerate found "
            f"{accelerator.num_processes}; {advice}"
        )
    return accelerator


@contextmanager
def _announce_waiting(world_size: int) -> Iterator[None]:
    """Log what a process waits for if it finds no others."""
    if world_size < 2:
        yield
        return
    rank, port = os.environ.get("RANK", "0"), os.environ.get("MASTER_PORT", "?")
    address = os.environ.get("MASTER_ADDR", "?")
    message = (
        f"process {rank} of WORLD_SIZE={world_size} waits for the other processes at {address}:{port}; "
        "if you started only one process, stop it and run: "
        "unset WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT"
    )
    timer = threading.Timer(PATIENCE, say, [message])
    timer.daemon = True
    timer.start()
    main = threading.current_thread() is threading.main_thread()
    # Python's handler can't run while torch waits
    before = signal.signal(signal.SIGINT, signal.SIG_DFL) if main else None
    try:
        yield
    finally:
        timer.cancel()
        if main:
            signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def close_accelerator(accelerator: Accelerator) -> None:
    """Leave the process group and reset Accelerate's state, so that another run can follow."""
    from accelerate.state import AcceleratorState, GradientState

    # prepared models refer to the process group: free them before it is destroyed
    accelerator.free_memory()
    accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def launched(precision: str) -> Iterator[Accelerator]:
    """`build_accelerator` for the duration of a run.

    Raises:
        TrainingError: another process died or stopped answering. Other errors pass unchanged.
    """
    accelerator = build_accelerator(precision)
    try:
        yield accelerator
    except RuntimeError as error:  # also DistBackendError
        if accelerator.num_processes == 1 or not _lost_peer(error):
            raise
        # without the location in gloo's sources
        reason = re.sub(r"^\[[^]]*\] *", "", str(error)).splitlines()[0].partition(". ")[0]
        raise TrainingError(
            f"lost contact with another process ({reason}); see its own message; "
            "run the same command again to resume from the last checkpoint"
        ) from error
    finally:
        close_accelerator(accelerator)


def _lost_peer(error: RuntimeError) -> bool:
    of_collectives = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
    return of_collectives and _LOST.search(str(error)) is not None


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Run `function` on the first process and return its result on all.

    An error is raised on all.
    """
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [function(), None]
        except LatentAEError as error:
            if accelerator.num_processes == 1:
                raise
            outcome = [None, error]
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def agree(accelerator: Accelerator, *flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is set on any process: all take the same branch."""
    if accelerator.num_processes == 1:
        return flags
    counts = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return tuple(count > 0 for count in accelerator.reduce(counts, "sum").tolist())  # pyright: ignore


def mean_over_processes(accelerator: Accelerator, value: T) -> T:
    """Mean of a tensor, or of each tensor of a list, over processes."""
    return value if accelerator.num_processes == 1 else accelerator.reduce(value, "mean")  # pyright: ignore

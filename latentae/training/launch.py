"""Processes and devices: one Accelerator, what processes agree on, and what happens when one is gone."""

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

__all__ = ["agree", "build_accelerator", "close_accelerator", "in_contact", "on_main"]

T = TypeVar("T")

# How long one process may work alone (a validation, a copy of a checkpoint) while the others wait for it.
TIMEOUT = timedelta(minutes=30)

# Seconds until a process that waits for others logs it.
PATIENCE = 5.0

_SHARDED = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}

# What gloo says when the other end is gone or silent; a collective whose shapes differ over processes, a bug, reads otherwise.
_LOST = re.compile(
    r"closed by (remote )?peer|connection (was )?(closed|reset|refused|aborted)|broken pipe|socket closed|pair closure|"
    r"timed out|read error|remote process exited|communicator was aborted",
    re.IGNORECASE,
)


def build_accelerator(precision: str) -> Accelerator:
    """The Accelerator of this process, under `accelerate launch`, torchrun or nothing.

    Raises:
        TrainingError: the launcher shards models (FSDP, DeepSpeed, Megatron-LM), or started processes that do not find each other.
    """
    for key, name in _SHARDED.items():
        if os.environ.get(f"ACCELERATE_USE_{key}", "false").lower() in ("true", "1", "yes"):
            raise TrainingError(
                f"the launcher asks for {name}, which takes one model, but two train side by side here (the autoencoder and its "
                "discriminator) and both fit on one device; start with torchrun, or `accelerate launch --multi_gpu`"
            )
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    gpu = torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Without cpu=True a CPU process under torchrun believes that it is alone: two silent trainings in one folder.
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
            f"the launcher's environment does not say how {world_size} processes meet ({error}); {advice}"
        ) from error
    if world_size != accelerator.num_processes:
        raise TrainingError(
            f"the launcher started {world_size} processes but Accelerate sees {accelerator.num_processes}; {advice}"
        )
    return accelerator


@contextmanager
def _announce_waiting(world_size: int) -> Iterator[None]:
    """Tell what a process waits for that finds no others, as after a launcher whose variables were left behind."""
    if world_size < 2:
        yield
        return
    rank, port = os.environ.get("RANK", "0"), os.environ.get("MASTER_PORT", "?")
    message = (
        f"process {rank} of WORLD_SIZE={world_size} waits for the other processes at {os.environ.get('MASTER_ADDR', '?')}:{port}; if you "
        "started one process only, stop it and run: unset WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT"
    )
    timer = threading.Timer(PATIENCE, say, [message])
    timer.daemon = True
    timer.start()
    main = threading.current_thread() is threading.main_thread()
    before = (
        signal.signal(signal.SIGINT, signal.SIG_DFL) if main else None
    )  # Python's handler can't run while torch waits
    try:
        yield
    finally:
        timer.cancel()
        if main:
            signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def close_accelerator(accelerator: Accelerator) -> None:
    """Leave the process group and forget Accelerate's process-wide state, so that another run can follow."""
    from accelerate.state import AcceleratorState, GradientState

    # the prepared models hold reducers, and those the process group: let go of them before it is destroyed
    accelerator.free_memory()
    accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Run `function` on the first process and return its result on all; its error is raised on all, so nobody waits for ever."""
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
    """For each flag, whether it is set on any process: all must take the same branch at the same step."""
    if accelerator.num_processes == 1:
        return flags
    counts = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return tuple(count > 0 for count in accelerator.reduce(counts, "sum").tolist())  # pyright: ignore


@contextmanager
def in_contact(accelerator: Accelerator) -> Iterator[None]:
    """Work together with other processes: when one of them is gone, what the collectives say becomes one line.

    Raises:
        TrainingError: another process died or went silent. Anything else, such as a bug, passes as it is.
    """
    try:
        yield
    except RuntimeError as error:  # DistBackendError and its kin are RuntimeErrors
        if accelerator.num_processes == 1 or not _lost_peer(error):
            raise
        reason = (
            re.sub(r"^\[[^]]*\] *", "", str(error)).splitlines()[0].partition(". ")[0]
        )  # without the place in gloo's sources
        raise TrainingError(
            f"lost contact with another process ({reason}); see its own message; the run goes on from the last checkpoint with the "
            "same command"
        ) from error


def _lost_peer(error: RuntimeError) -> bool:
    of_collectives = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
    return of_collectives and _LOST.search(str(error)) is not None

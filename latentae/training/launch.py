"""Processes and devices: one Accelerator, and work that only the first process does."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from latentae.errors import LatentAEError, TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["build_accelerator", "close_accelerator", "on_main"]

T = TypeVar("T")


def build_accelerator(precision: str) -> Accelerator:
    """The Accelerator of this process, under `accelerate launch`, torchrun or nothing.

    Raises:
        TrainingError: the launcher started more processes than Accelerate sees, or the device has no bf16.
    """
    from accelerate import Accelerator

    gpu = torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Without cpu=True a CPU process under torchrun believes that it is alone: two silent trainings in one folder.
    accelerator = Accelerator(
        cpu=not gpu and not torch.backends.mps.is_available(),
        mixed_precision="bf16" if precision == "bf16" else "no",
    )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != accelerator.num_processes:
        raise TrainingError(
            f"the launcher started {world_size} processes but Accelerate sees {accelerator.num_processes}; "
            "start with `accelerate launch -m latentae train ...` or `torchrun -m latentae train ...`"
        )
    kind = str(accelerator.distributed_type)
    if kind.endswith(("FSDP", "DEEPSPEED", "MEGATRON_LM")):
        raise TrainingError(f"training under {kind} is not supported: two models train side by side; use plain multi-GPU (DDP)")
    return accelerator


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

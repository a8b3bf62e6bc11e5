"""Processes: the Accelerator, shared decisions, lost processes, and clean stops by signals."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from latentae.errors import Interrupted, LatentAEError, TrainingError
from latentae.progress import say

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "StopFlag",
    "agree",
    "build_accelerator",
    "close_accelerator",
    "launched",
    "mean_over_processes",
    "on_main",
]

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # of waiting for a process that validates or copies a checkpoint
PATIENCE = 5.0  # seconds after which a process logs that it waits for others

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


class StopFlag:
    """`with StopFlag() as stop:` SIGINT, SIGTERM and SIGUSR1 set `stop.requested`.

    A second SIGINT interrupts at once.

    Outside the main thread, where Python can't install handlers, no signal sets the flag.

    Attributes:
        signals: names of the signals received, in order, each once.
    """

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
    )

    def __init__(self, announce: bool = True) -> None:
        self.signals: list[str] = []
        self.announce = announce
        self._at_once = False
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal was received."""
        return bool(self.signals)

    @property
    def requeue(self) -> bool:
        """Whether the exit code requests a requeue: always, unless only this process got Ctrl-C."""
        return self.signals != ["SIGINT"]

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():  # None: it was not set from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def at_once(self, when: str = "before the first step") -> Iterator[None]:
        """A span with nothing to save, such as compilation, which a signal interrupts.

        Args:
            when: for the message.

        Raises:
            Interrupted: a signal was received, before or in the span.
        """
        cause = None
        try:
            self._at_once = not self.requested
            if self._at_once:
                yield
        except BaseException as error:  # a compiler may wrap the interruption in its own error
            if not self.requested:
                raise
            cause = error
        finally:
            self._at_once = False
        if self.requested:
            message = f"stopped by {self.signals[0]} {when}; run the same command again to resume"
            raise self.interrupted(message) from cause

    def request(self, reason: str) -> None:
        """Request a stop as a signal does, from any thread."""
        self.signals.append(reason)

    def interrupted(self, message: str) -> Interrupted:
        """The error to raise, with the exit code that fits the signals."""
        return Interrupted(message, Interrupted.REQUEUE if self.requeue else Interrupted.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data worker; its parent decides
            return
        again, name = self.requested, signal.Signals(number).name
        if name not in self.signals:
            self.signals.append(name)
        if (self._at_once and not again) or (again and number == signal.SIGINT):
            raise KeyboardInterrupt  # no `except Exception` can stop it
        if self.announce and not again:
            with suppress(RuntimeError):  # another line may be in the middle of being printed
                say(f"{name}: finishing this step and saving; press Ctrl-C again to stop at once")

"""Clean stops: a signal sets a flag that the loop reads between steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from latentae.errors import Interrupted
from latentae.progress import say

__all__ = ["StopFlag"]


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

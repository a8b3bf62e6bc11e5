"""Stopping cleanly: a signal sets a flag that the loop reads between steps, or ends at once what has nothing to save."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from latentae.errors import Interrupted
from latentae.progress import say

__all__ = ["StopFlag"]


class StopFlag:
    """`with StopFlag() as stop:` SIGINT, SIGTERM and SIGUSR1 set `stop.requested`; a second SIGINT interrupts at once.

    Outside the main thread, where Python can't install handlers, the flag is never set by a signal.

    Attributes:
        signals: names of the signals that came, in order, each once.
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
        """Whether a signal came."""
        return bool(self.signals)

    @property
    def requeue(self) -> bool:
        """Whether to say that the same command should be started again: unless only Ctrl-C came, to this process."""
        return self.signals != ["SIGINT"]

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(
                number, signal.SIG_DFL if handler is None else handler
            )  # None: it was not set from Python

    @contextmanager
    def at_once(self, when: str = "before the first step") -> Iterator[None]:
        """A span in which nothing can be lost (start-up, compilation): a signal ends it where it is.

        Args:
            when: for the message.

        Raises:
            Interrupted: a signal came, before or in the span.
        """
        try:
            try:
                self._at_once = not self.requested
                if self._at_once:
                    yield
            finally:
                self._at_once = False
        except BaseException as error:
            if not self.requested:
                raise
            # whatever the code underneath made of the interruption (a compiler wraps what it did not expect)
            raise self._nothing_lost(when) from error
        if self.requested:
            raise self._nothing_lost(when)

    def request(self, reason: str) -> None:
        """Ask for the end as a signal does, from any thread."""
        self.signals.append(reason)

    def _nothing_lost(self, when: str) -> Interrupted:
        return self.interrupted(f"stopped by {self.signals[0]} {when}; the same command goes on")

    def interrupted(self, message: str) -> Interrupted:
        """The error to raise, with the exit code that the signals ask for."""
        return Interrupted(message, Interrupted.REQUEUE if self.requeue else Interrupted.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data worker, which a scheduler signals too: its parent decides
            return
        again, name = self.requested, signal.Signals(number).name
        if name not in self.signals:
            self.signals.append(name)
        if self._at_once and not again:
            raise KeyboardInterrupt  # no `except Exception` on the way can hold it up
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.announce and not again:
            with suppress(RuntimeError):  # it may have come in the middle of another line
                say(f"{name}: finishing this step and saving; press Ctrl-C again to stop at once")

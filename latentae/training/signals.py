"""Stopping cleanly: a signal sets a flag that the loop reads between steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from latentae.progress import say

__all__ = ["StopFlag"]


class StopFlag:
    """`with StopFlag() as stop:` SIGINT and SIGTERM set `stop.requested`; a second SIGINT interrupts at once.

    Outside the main thread, where Python can't install handlers, the flag is never set by a signal.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, announce: bool = True) -> None:
        self.requested = False
        self.announce = announce
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        if self.announce:
            say(f"{signal.Signals(number).name}: finishing this step and saving; press Ctrl-C again to stop at once")

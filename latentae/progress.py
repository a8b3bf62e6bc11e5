"""Progress of long work with speed and time left: a bar on a terminal, else lines."""

from __future__ import annotations

import os
import sys
import time
from functools import cache
from types import TracebackType

__all__ = ["Progress", "duration", "note", "say"]

_active: Progress | None = None


def say(message: str) -> None:
    """Print one line to standard error, above a running bar."""
    if _active is not None and _active._bar is not None:
        _active._bar.console.print(message, markup=False, highlight=False)
    elif sys.stderr is not None:  # without one, print() would use standard output
        print(message, file=sys.stderr, flush=True)


@cache
def note(message: str) -> None:
    """Print a line once, and only in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        say(message)


def duration(seconds: float) -> str:
    """`2 d 4 h`, `3 h 05 min`, `12 min` or `40 s`."""
    minutes = round(seconds / 60)
    hours, days = minutes // 60, round(seconds / 3600) // 24
    if seconds < 90:
        return f"{seconds:.0f} s"
    if days:
        return f"{days} d {round(seconds / 3600) % 24} h"
    return f"{hours} h {minutes % 60:02} min" if hours else f"{minutes} min"


class Progress:
    """`with Progress("encoding", total=5000) as progress: ... progress.advance(16)`.

    Args:
        description: a word or two.
        total: number of units; None if unknown.
        unit: name of a unit.
        initial: units done earlier (a resumed job); they do not count for the speed.
        every: seconds between lines if standard error is not a terminal.
        quiet: print nothing (ranks other than the first).
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        unit: str = "img",
        initial: int = 0,
        every: float = 20.0,
        quiet: bool = False,
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.initial, self.every, self.quiet = initial, every, quiet
        self.done = initial
        self._bar = None
        self._note = ""

    def __enter__(self) -> Progress:
        self._start = self._last_line = time.monotonic()
        if not self.quiet and sys.stderr is not None and sys.stderr.isatty() and _active is None:
            self._open_bar()
        return self

    def _open_bar(self) -> None:
        global _active
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(
            self.description, total=self.total, completed=self.initial, speed="", note=""
        )
        self._bar.start()
        _active = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _active
        if self._bar is not None:
            self._bar.stop()
            self._bar = _active = None
        elif not self.quiet and kind is None and self.done > self.initial:
            self._print(f"done in {duration(time.monotonic() - self._start)}")

    @property
    def speed(self) -> float:
        """Units per second in this run."""
        return (self.done - self.initial) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more units; `note` replaces the short text at the end of the line."""
        self.done += count
        self._note = self._note if note is None else note
        if self._bar is not None:
            speed = f"{self.speed:.3g} {self.unit}/s"
            self._bar.update(self._task, completed=self.done, speed=speed, note=self._note)
        elif not self.quiet and time.monotonic() - self._last_line >= self.every:
            left = self.total and self.speed > 0 and duration((self.total - self.done) / self.speed)
            self._print(f"{left} left" if left else "")

    def _print(self, time_left: str) -> None:
        self._last_line = time.monotonic()
        done = f"{self.done}/{self.total}" if self.total else f"{self.done}"
        parts = [f"{done} {self.unit}", f"{self.speed:.3g} {self.unit}/s", time_left, self._note]
        say(f"{self.description}: {', '.join(filter(None, parts))}")

"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere, always with speed and time left."""

from __future__ import annotations

import os
import sys
import time
from functools import cache
from types import TracebackType

__all__ = ["Progress", "duration", "note", "say"]

_active: Progress | None = None


def say(message: str) -> None:
    """Print one line to standard error, above a running bar if there is one."""
    if _active is not None and _active._bar is not None:
        _active._bar.console.print(message, markup=False, highlight=False)
    elif sys.stderr is not None:  # a process can be without one; print() would then take standard output
        print(message, file=sys.stderr, flush=True)


@cache
def note(message: str) -> None:
    """Log a line once, by the first of several processes: several steps of a verb may find the same."""
    if os.environ.get("RANK", "0") == "0":
        say(message)


class Progress:
    """`with Progress("encoding", total=5000) as progress: ... progress.advance(16)`.

    Args:
        description: what is being done, in a word or two.
        total: units in all; None where unknown.
        unit: what is counted.
        initial: units already done (a resumed job); they do not count for the speed.
        every: seconds between plain lines when standard error is no terminal.
        quiet: print nothing (other ranks than the first).
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
        self.description, self.total, self.unit, self.initial, self.every, self.quiet = (
            description,
            total,
            unit,
            initial,
            every,
            quiet,
        )
        self.done = initial
        self._bar = None
        self._note = ""

    def __enter__(self) -> Progress:
        global _active
        self._start = self._last_line = time.monotonic()
        if not self.quiet and sys.stderr is not None and sys.stderr.isatty() and _active is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(
                self.description, total=self.total, completed=self.initial, speed="", note=""
            )
            self._bar.start()
            _active = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _active
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            _active = None
        elif not self.quiet and kind is None and self.done > self.initial:
            self._line(finished=True)

    @property
    def speed(self) -> float:
        """Units per second since the start of this run."""
        return (self.done - self.initial) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more units; `note` replaces the short text at the end of the line."""
        self.done += count
        if note is not None:
            self._note = note
        if self._bar is not None:
            self._bar.update(
                self._task, completed=self.done, speed=f"{self.speed:.3g} {self.unit}/s", note=self._note
            )
        elif not self.quiet and time.monotonic() - self._last_line >= self.every:
            self._line()

    def _line(self, finished: bool = False) -> None:
        self._last_line = time.monotonic()
        parts = [
            f"{self.done}/{self.total} {self.unit}" if self.total else f"{self.done} {self.unit}",
            f"{self.speed:.3g} {self.unit}/s",
        ]
        if finished:
            parts.append(f"done in {duration(time.monotonic() - self._start)}")
        elif self.total and self.speed > 0:
            parts.append(f"{duration((self.total - self.done) / self.speed)} left")
        if self._note:
            parts.append(self._note)
        say(f"{self.description}: {', '.join(parts)}")


def duration(seconds: float) -> str:
    """`2 d 4 h`, `3 h 05 min`, `12 min` or `40 s`."""
    minutes = round(seconds / 60)
    hours, days = minutes // 60, round(seconds / 3600) // 24
    if seconds < 90:
        return f"{seconds:.0f} s"
    if days:
        return f"{days} d {round(seconds / 3600) % 24} h"
    return f"{hours} h {minutes % 60:02} min" if hours else f"{minutes} min"

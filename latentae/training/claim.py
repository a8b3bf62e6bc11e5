"""Claims: one process at a time trains into a run folder or copies to a URL.

A claim is a small file that names its holder (host, process, start). The holder changes it every
BEAT seconds. On the same machine, a holder that has ended is recognized at once. A claim of another
machine is taken over if it does not change for WATCH seconds.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from latentae.errors import BusyError, OutputError
from latentae.files import INCOMPLETE, alive, alone, here, write_text
from latentae.progress import say

__all__ = ["BEAT", "CLAIM", "WATCH", "Claim", "ClaimPlace", "FolderPlace"]

CLAIM = f".claim{INCOMPLETE}"  # verbs ignore files with this ending
BEAT = 10.0  # seconds between renewals
WATCH = 90.0  # seconds; network disks may show a change a minute late
SETTLE = 2.0  # seconds after which an object store shows the last of two claims


class ClaimPlace(Protocol):
    """Where a claim is kept."""

    name: str
    """For messages."""

    def read(self) -> bytes | None:
        """The existing claim."""
        ...

    def write(self, data: bytes) -> None:
        """Replace the claim atomically."""
        ...

    def remove(self) -> None:
        """Remove the claim."""
        ...

    def alone(self) -> AbstractContextManager[None] | None:
        """A lock for reading and claiming; None if the file system has none."""
        ...


class FolderPlace:
    """A claim in a run folder, which is created if missing and removed if it stays empty."""

    def __init__(self, folder: Path) -> None:
        self.name, self.folder = str(folder), folder
        try:
            self._new = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"could not use {folder} as an output folder: {error.strerror}") from error

    def read(self) -> bytes | None:
        """The existing claim."""
        try:
            return (self.folder / CLAIM).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, data: bytes) -> None:
        """Replace the claim atomically."""
        write_text(self.folder / CLAIM, data.decode())

    def remove(self) -> None:
        """Remove the claim, and the folder if it is new and empty."""
        with suppress(OSError):
            (self.folder / CLAIM).unlink()
            if self._new:
                self.folder.rmdir()

    def alone(self) -> AbstractContextManager[None]:
        """Wait until no other process reads or writes the claim."""
        return alone(self.folder)


@dataclass
class Claim:
    """This process's claims, renewed by a thread until `release`.

    Args:
        lost: called, in the thread, when another process has taken a place over, as after a pause
            of more than `watch` seconds.
        beat, watch, settle: seconds, as BEAT, WATCH and SETTLE.
    """

    lost: Callable[[], None] = lambda: None
    beat: float = BEAT
    watch: float = WATCH
    settle: float = SETTLE
    _places: list[ClaimPlace] = field(default_factory=list)
    _taken_over: str | None = None
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self._token, self._beats = uuid.uuid4().hex, 0
        self._holder = {
            "host": platform.node(),
            "process": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "where": f"{here()} {_boot()}",
            "started": _started(os.getpid()),
            "token": self._token,
        }

    def take(self, place: ClaimPlace) -> None:
        """Claim a place, and renew the claim until `release`.

        Raises:
            BusyError: another process holds it.
        """
        lock = place.alone()
        with lock or nullcontext():
            found = place.read()
            if found is not None and self._holds(place, found):
                raise BusyError(_busy(place.name, _parse(found)))
            place.write(self._data())
        if lock is None:  # of two that wrote at the same time, the last one holds the place
            time.sleep(self.settle)
            found = place.read()
            if found is None or _parse(found).get("token") != self._token:
                raise BusyError(_busy(place.name, _parse(found or b"{}")))
        self._places.append(place)
        if self._thread is None:
            self._thread = threading.Thread(target=self._renew, name="claim", daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Raise if another process has taken a place over.

        Raises:
            BusyError: it has; this process must not write any more.
        """
        if self._taken_over is not None:
            raise BusyError(self._taken_over)

    def release(self) -> None:
        """Stop renewing and remove the claims that this process still holds."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=self.beat)  # a store that does not answer must not block
        for place in self._places:
            with suppress(Exception):  # a claim that is not renewed expires
                if _parse(place.read() or b"{}").get("token") == self._token:
                    place.remove()
        self._places.clear()

    def _holds(self, place: ClaimPlace, found: bytes) -> bool:
        """Whether the holder of a claim still runs."""
        holder = _parse(found)
        if holder.get("where") == self._holder["where"]:
            process = holder.get("process")
            return isinstance(process, int) and alive(process) and _started(process) == holder.get("started")
        say(f"{place.name} is claimed by {_who(holder)}; waiting {self.watch:.0f} s for a sign of life")
        end = time.monotonic() + self.watch
        while time.monotonic() < end:
            time.sleep(min(1.0, self.watch / 10))
            now = place.read()
            if now is None:
                return False
            if now != found:
                return True
        return False

    def _data(self) -> bytes:
        return json.dumps({**self._holder, "beat": self._beats}).encode()

    def _renew(self) -> None:
        while not self._ended.wait(self.beat):
            self._beats += 1
            for place in list(self._places):
                with suppress(Exception):  # a store that does not answer; the next beat tries again
                    found = place.read()
                    holder = _parse(found or b"{}")
                    if found is not None and holder.get("token") != self._token:
                        self._taken_over = _busy(place.name, holder)
                        self.lost()
                        return
                    if self._ended.is_set():  # the read was slow: `release` may have removed the claim
                        return
                    place.write(self._data())


def _who(holder: dict[str, Any]) -> str:
    process, host, since = (holder.get(key, "?") for key in ("process", "host", "since"))
    return f"process {process} on {host}, since {since}"


def _busy(name: str, holder: dict[str, Any]) -> str:
    found = f"{name} is in use by another training ({_who(holder)})"
    return f"{found}; wait for its end, stop it, or choose another output"


def _parse(data: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(data)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _boot() -> str:
    """An identifier of this boot of the machine; empty if the system has none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _started(process: int) -> str | None:
    """Start of a process on this machine, in ticks: process numbers are reused."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return None

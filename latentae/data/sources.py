"""The bytes of local and remote shards: ranges and streams return all requested bytes, or raise."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentae.data import remote
from latentae.data.remote import ByteStream, is_remote, shown
from latentae.errors import ShardError

__all__ = [
    "ByteStream",
    "copy_to",
    "is_remote",
    "name_of",
    "read_exactly",
    "read_range",
    "shard_changed",
    "shown",
    "size_of",
    "sizes_of",
    "stream",
    "will_read",
]

MAX_OPEN = 64  # local files that each process keeps open


def name_of(path: str) -> str:
    """The file name of a path or URL."""
    return shown(path).rstrip("/").rpartition("/")[2] if is_remote(path) else Path(path).name


def size_of(path: str) -> int:
    """Bytes of a file.

    Raises:
        ShardError: it is missing, or its size is unknown.
    """
    if is_remote(path):
        return remote.size_of(path)
    with _errors(path):
        return Path(path).stat().st_size


def sizes_of(paths: Sequence[str]) -> list[int]:
    """Bytes of each file, in few requests if the store lists them; errors as `size_of`."""
    if not any(map(is_remote, paths)):
        return [size_of(path) for path in paths]
    far = [path for path in paths if is_remote(path)]
    sizes = dict(zip(far, remote.sizes_of(far), strict=True))
    return [sizes[path] if path in sizes else size_of(path) for path in paths]


def read_range(path: str, start: int, stop: int) -> bytes:
    """All bytes from `start` to `stop` of a file.

    Each process keeps a few dozen local files open. Remote ranges are retried after server errors,
    broken streams and timeouts, within the limits of `remote.patience`.

    Raises:
        ShardError: missing, shorter than `stop`, or unreadable.
    """
    if start >= stop:
        return b""
    if is_remote(path):
        return remote.read_range(path, start, stop)
    with _errors(path):
        found = _files().read(path, start, stop)
    if len(found) != stop - start:
        end = start + len(found)
        raise ShardError(f"shard {path} ends at byte {end}, expected {stop} or more; it has changed")
    return found


def will_read(path: str, start: int, stop: int) -> None:
    """Tell the system that a range of a local file will be read soon.

    Remote files ignore the hint.
    """
    if hasattr(os, "posix_fadvise") and not is_remote(path):
        with _errors(path):
            _files().advise(path, start, stop)


@contextmanager
def stream(path: str) -> Iterator[ByteStream]:
    """Stream a file from its beginning. A broken remote stream is resumed.

    Raises:
        ShardError: as `read_range`, here or while reading.
    """
    if is_remote(path):
        with remote.stream(path) as file:
            yield file
        return
    with _errors(path):
        file = Path(path).open("rb", buffering=0)  # noqa: SIM115 (closed below; reads have errors of their own)
    with file:
        yield _LocalStream(path, file)


def copy_to(path: str, target: Path) -> None:
    """Copy a file to a local path; errors as `stream`."""
    with stream(path) as source, target.open("wb") as file:
        while data := source.read(1 << 22):
            file.write(data)


def read_exactly(path: str, file: ByteStream, start: int, stop: int) -> bytes:
    """The next `stop - start` bytes of a stream of `path`; ShardError if there are fewer."""
    data = file.read(stop - start)
    if len(data) != stop - start:
        raise shard_changed(path)
    return data


def shard_changed(path: str) -> ShardError:
    """The error for a shard that changes while it is read."""
    advice = "run the same command again once it is complete"
    return ShardError(f"shard {shown(path)} changed while it was read; {advice}")


class _LocalStream:
    def __init__(self, path: str, file: Any) -> None:
        self._path, self._file = path, file

    def read(self, count: int) -> bytes:
        with _errors(self._path):
            found = self._file.read(count)
            while found and len(found) < count and (more := self._file.read(count - len(found))):
                found += more
        return found


@contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        hint = "pass a folder of .tar files, a file, a glob, a brace pattern or a URL"
        raise ShardError(f"no shard {path}; {hint}") from None
    except OSError as error:
        reason = error.strerror or error
        raise ShardError(f"shard {path} can't be read ({reason}); check the file and the disk") from error


class _OpenFiles:
    """An LRU cache of file descriptors. Reads pass their position, so threads can share them."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._lock = threading.Lock()
        # path -> descriptor, device, inode
        self._files: OrderedDict[str, tuple[int, int, int]] = OrderedDict()

    def read(self, path: str, start: int, stop: int) -> bytes:
        if not hasattr(os, "pread"):  # Windows
            with Path(path).open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        with self._lock:
            descriptor = os.dup(self._open(path))  # another thread may close the kept one
        try:
            pieces = []
            while start < stop and (piece := os.pread(descriptor, min(stop - start, 1 << 30), start)):
                pieces.append(piece)
                start += len(piece)
        finally:
            os.close(descriptor)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def advise(self, path: str, start: int, stop: int) -> None:
        with self._lock:
            os.posix_fadvise(self._open(path), start, stop - start, os.POSIX_FADV_WILLNEED)

    def _open(self, path: str) -> int:
        status = os.stat(path)  # noqa: PTH116 (once per sample)
        kept = self._files.get(path)
        if kept is not None and kept[1:] == (status.st_dev, status.st_ino):
            self._files.move_to_end(path)
            return kept[0]
        if kept is not None:  # the name now belongs to another file
            os.close(self._files.pop(path)[0])
        while len(self._files) >= MAX_OPEN:
            os.close(self._files.popitem(last=False)[1][0])
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._files[path] = (descriptor, status.st_dev, status.st_ino)
        return descriptor


_open_files: _OpenFiles | None = None


def _files() -> _OpenFiles:
    """This process's files.

    After a fork, the parent's lock may be locked by a thread that does not exist here.
    """
    global _open_files
    if _open_files is None or _open_files.process != os.getpid():
        _open_files = _OpenFiles()
    return _open_files

"""The bytes of shards, local or remote: ranges and whole files, of the length asked for or an error."""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from latentae.errors import ShardError

__all__ = [
    "ByteStream",
    "is_remote",
    "name_of",
    "read_range",
    "shown",
    "size_of",
    "sizes_of",
    "stream",
    "will_read",
]

MAX_OPEN = 64  # local files kept open in each process

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")  # two letters or more: C:// is a drive


class ByteStream(Protocol):
    """What `stream` gives: a file read from its beginning to its end."""

    def read(self, count: int) -> bytes:
        """The next `count` bytes; fewer only at the end."""
        ...


def is_remote(path: str) -> bool:
    """Whether a path has a scheme such as `http://`, `s3://`, `gs://`, `hf://` or `memory://`.

    Raises:
        ShardError: `pipe:`, which would run a program.
    """
    if path.startswith("pipe:"):
        raise ShardError(f"{path!r} would run a program; shards must be local files or URLs")
    return _SCHEME.match(path) is not None


def shown(path: str) -> str:
    """A path as messages and records show it: a URL without password and query, which may hold a signature."""
    if not is_remote(path):
        return path
    scheme, _, rest = path.partition("://")
    host, slash, tail = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{tail}"


def name_of(path: str) -> str:
    """The file name of a path or URL."""
    return shown(path).rstrip("/").rpartition("/")[2] if is_remote(path) else Path(path).name


def size_of(path: str) -> int:
    """Bytes of a file.

    Raises:
        ShardError: it is missing, or its size can't be had.
    """
    if is_remote(path):
        from latentae.data import remote

        return remote.size_of(path)
    with _errors(path):
        return Path(path).stat().st_size


def sizes_of(paths: Sequence[str]) -> list[int]:
    """Bytes of each file, in fewer requests than one for each where a store lists them; errors as `size_of`."""
    if not any(map(is_remote, paths)):
        return [size_of(path) for path in paths]
    from latentae.data import remote

    far = [path for path in paths if is_remote(path)]
    sizes = dict(zip(far, remote.sizes_of(far), strict=True))
    return [sizes[path] if path in sizes else size_of(path) for path in paths]


def read_range(path: str, start: int, stop: int) -> bytes:
    """The bytes from `start` to `stop` of a file: all of them, or an error.

    Local files stay open, a few dozen in each process; remote ranges are asked for again after server errors, cut streams and
    timeouts, up to a limit.

    Raises:
        ShardError: missing, shorter than `stop`, or not to be read.
    """
    if start >= stop:
        return b""
    if is_remote(path):
        from latentae.data import remote

        return remote.read_range(path, start, stop)
    with _errors(path):
        found = _files().read(path, start, stop)
    if len(found) != stop - start:
        raise ShardError(
            f"shard {path} ends at byte {start + len(found)}, expected {stop} or more; it changed or was cut short"
        )
    return found


def will_read(path: str, start: int, stop: int) -> None:
    """Tell the system that a range of a local file will be read soon; a hint without effect elsewhere."""
    if hasattr(os, "posix_fadvise") and not is_remote(path):
        with _errors(path):
            _files().advise(path, start, stop)


@contextmanager
def stream(path: str) -> Iterator[ByteStream]:
    """A whole file from its beginning; a remote one is resumed where it broke off.

    Raises:
        ShardError: as `read_range`, here or while reading.
    """
    if is_remote(path):
        from latentae.data import remote

        with remote.stream(path) as file:
            yield file
        return
    with ExitStack() as stack:
        with _errors(path):
            file = stack.enter_context(Path(path).open("rb", buffering=0))
        yield _LocalStream(path, file)


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
        raise ShardError(
            f"no shard {path}; pass a folder of .tar files, a file, a glob, a brace pattern or a URL"
        ) from None
    except OSError as error:
        raise ShardError(
            f"shard {path} can't be read ({error.strerror or error}); check the file and the disk"
        ) from error


class _OpenFiles:
    """Descriptors of local files, the least recently used closed first. Reads name their position, so threads can share them."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[str, tuple[int, int, int]] = (
            OrderedDict()
        )  # path -> descriptor, device, inode

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
        there = os.stat(path)  # noqa: PTH116 (once for every sample read)
        kept = self._files.get(path)
        if kept is not None and kept[1:] == (there.st_dev, there.st_ino):
            self._files.move_to_end(path)
            return kept[0]
        if kept is not None:  # another file has taken its name
            os.close(self._files.pop(path)[0])
        while len(self._files) >= MAX_OPEN:
            os.close(self._files.popitem(last=False)[1][0])
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._files[path] = (descriptor, there.st_dev, there.st_ino)
        return descriptor


_open_files: _OpenFiles | None = None


def _files() -> _OpenFiles:
    """This process's files: after a fork the parent's lock may be held by a thread that is not there."""
    global _open_files
    if _open_files is None or _open_files.process != os.getpid():
        _open_files = _OpenFiles()
    return _open_files

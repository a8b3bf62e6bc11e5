"""An output folder on any file system that fsspec knows.

An object store has no rename but takes a file in one piece; anything else gets it under another name first. Whatever was uploaded is
read back and its SHA-256 compared, for a remote file system may say that it wrote what it did not.
"""

from __future__ import annotations

import hashlib
import io
import random
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from latentae.data.sources import read_range, shown
from latentae.encoding.store import Store
from latentae.errors import LatentAEError, MissingDependencyError, OutputError
from latentae.file_names import RECORD
from latentae.files import INCOMPLETE, sha256, write_advice
from latentae.jobs import RemoteJob

__all__ = ["RemoteStore"]

WAITS = (1.0, 5.0, 20.0)  # seconds before each new try of an operation
_BLOCK = 1 << 22
_T = TypeVar("_T")


class _Damaged(Exception):
    """Other bytes than were written."""


class RemoteStore(Store):
    """A folder of a file system that fsspec knows."""

    is_local = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        _ = self._fs  # an address that can't work is an error now

    @property
    def shown(self) -> str:
        """The URL without password and query."""
        return shown(self.url)

    @property
    def _fs(self) -> tuple[Any, str]:
        """File system and root. fsspec keeps one for each process and thread, so none must be carried over a fork."""
        try:
            from fsspec.core import url_to_fs

            fs, root = url_to_fs(self.url)
        except ImportError as error:
            raise MissingDependencyError(f"{self.shown}: {error}; install it and try again") from error
        except ValueError as error:
            raise OutputError(
                f"{self.shown} can't be opened ({error}); use a scheme that fsspec knows"
            ) from error
        return fs, root.rstrip("/")

    def _at(self, name: str) -> tuple[Any, str]:
        fs, root = self._fs
        return fs, f"{root}/{self._check(name)}"

    def sizes(self) -> dict[str, int]:
        """All files and their sizes, in one listing."""

        def once() -> dict[str, int]:
            fs, root = self._fs
            fs.invalidate_cache()
            found = fs.find(root, detail=True)
            inside = {
                path.removeprefix(root).lstrip("/"): int(info["size"] or 0) for path, info in found.items()
            }
            return {name: size for name, size in inside.items() if name and not name.endswith(INCOMPLETE)}

        return self._try("list the files", once) or {}

    def read(self, name: str) -> bytes | None:
        """A whole file."""
        fs, path = self._at(name)
        return self._try(f"read {name}", lambda: fs.cat_file(path))

    def size(self, name: str) -> int | None:
        """Bytes of a file."""
        fs, path = self._at(name)

        def once() -> int | None:
            fs.invalidate_cache()
            info = fs.info(path)
            return int(info["size"]) if info["type"] == "file" else None

        return self._try(f"read the size of {name}", once)

    @contextmanager
    def reader(self, name: str) -> Iterator[BinaryIO]:
        """A file read in ranges, each tried again after errors that may pass."""
        size = self.size(name)
        if size is None:
            raise OutputError(f"{self.show(name)} is not there; encode again")
        with io.BufferedReader(_Ranges(f"{self.url}/{name}", size), buffer_size=1 << 17) as file:
            yield file

    @contextmanager
    def write(self, name: str) -> Iterator[Path]:
        """A path in a temporary folder, uploaded at the end and read back."""
        self._check(name)
        with tempfile.TemporaryDirectory(prefix="latentae-") as folder:
            path = Path(folder) / PurePosixPath(name).name
            try:
                yield path
                digest, size = sha256(path), path.stat().st_size
            except LatentAEError:
                raise
            except OSError as error:
                reason = error.strerror or error
                advice = write_advice(error.errno)
                raise OutputError(
                    f"could not write {name} to a temporary folder: {reason}; {advice} (TMPDIR)"
                ) from error
            self._upload(path, name, digest, size)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file, whole or not at all; no disk is needed."""
        self._upload(data, name, hashlib.sha256(data).hexdigest(), len(data))

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        fs, path = self._at(name)
        self._try(f"remove {name}", lambda: fs.rm_file(path))

    def claim(
        self, verb: str, inputs: Mapping[str, Any], notes: Mapping[str, Any] | None = None
    ) -> RemoteJob:
        """See `Job.open`."""
        there = self.read(RECORD)
        others = [] if there is not None else [name for name in self.names() if name != RECORD]
        return RemoteJob.open(
            self.shown, there, others, verb, inputs, partial(self.write_bytes, RECORD), notes
        )

    def record(self) -> dict[str, Any]:
        """See `Job.read`."""
        return RemoteJob.read(self.shown, self.read(RECORD))

    def _upload(self, data: Path | bytes, name: str, digest: str, size: int) -> None:
        fs, path = self._at(name)
        # An object store (asynchronous in fsspec) shows a file once it is whole; elsewhere half a file would have its name.
        first = path if fs.async_impl else f"{path}.{secrets.token_hex(8)}{INCOMPLETE}"

        def once() -> None:
            if not fs.async_impl:
                fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            try:
                fs.pipe_file(first, data) if isinstance(data, bytes) else fs.put_file(str(data), first)
                if first != path:
                    fs.mv(first, path)
            except BaseException:
                if first != path:
                    with suppress(Exception):
                        fs.rm_file(first)
                raise
            self._compare(name, digest, size)

        try:
            self._try(f"write {name}", once, missing=False)
        except _Damaged as error:
            with suppress(OutputError):
                self.remove(name)
            raise OutputError(
                f"{self.show(name)}: {error}; check the storage and run the same command again"
            ) from error

    def _compare(self, name: str, digest: str, size: int) -> None:
        fs, path = self._at(name)
        found, length = hashlib.sha256(), 0
        fs.invalidate_cache()
        try:
            with fs.open(path, "rb") as file:
                while block := file.read(_BLOCK):
                    found.update(block)
                    length += len(block)
        except FileNotFoundError as error:
            raise _Damaged("it was not there after it was written") from error
        if length != size or found.hexdigest() != digest:
            raise _Damaged(f"it came back with other bytes ({length} of them, {size} were written)")

    def _try(self, what: str, once: Callable[[], _T], *, missing: bool = True) -> _T | None:
        """Call `once` until it returns, with growing waits; None where a file may be missing, and is."""
        tries = 0
        while True:
            try:
                return once()
            except LatentAEError:
                raise
            except Exception as error:
                if missing and isinstance(error, FileNotFoundError):
                    return None
                tries += 1
                passing = not isinstance(
                    error, PermissionError | NotImplementedError | IsADirectoryError | NotADirectoryError
                )
                if tries <= len(WAITS) and passing:
                    time.sleep(WAITS[tries - 1] * (0.5 + random.random()))
                    continue
                if isinstance(error, _Damaged):
                    raise
                reason = " ".join(str(error).replace(self.url, self.shown).split()) or type(error).__name__
                raise OutputError(
                    f"could not {what} at {self.shown} ({reason}) in {tries} tries; check the address, your access and the space there, "
                    "and run the same command again"
                ) from error


class _Ranges(io.RawIOBase):
    """A remote file as ranges of it."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._position = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._position = max(
            0, {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence] + offset
        )
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._position + len(view), self._size)
        data = read_range(self._url, self._position, stop)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

"""Output folders on a local disk or any fsspec file system. Files appear complete or not at all.

On a disk a file gets its name by a rename after fsync. An object store has no rename, but takes a
file in one piece; any other remote file system gets the file under a temporary name first. Every
upload is read back and its SHA-256 compared, because a remote write can fail without an error.

Methods raise OutputError if the file system fails or a name points outside the folder.
"""

from __future__ import annotations

import hashlib
import os
import random
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from latentae.data.sources import is_remote, shown
from latentae.errors import LatentAEError, MissingDependencyError, OutputError
from latentae.file_names import RECORD
from latentae.files import INCOMPLETE, abandoned, atomic_file, sha256, write_advice
from latentae.jobs import Job

__all__ = ["LocalStore", "RemoteStore", "Store", "open_store"]

WAITS = (1.0, 5.0, 20.0)  # seconds before each retry of a remote operation
_BLOCK = 1 << 22
_T = TypeVar("_T")


class _Named:
    """Names of files: paths inside the folder with forward slashes."""

    shown: str
    """The address for messages and records, without password and query."""

    def show(self, name: str) -> str:
        """The address of a file, for messages."""
        return f"{self.shown}/{name}"

    def _check(self, name: str) -> str:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or name != str(path):
            raise OutputError(
                f"{name!r} is no valid file name in {self.shown}; the file that lists it is damaged"
            )
        return name


class LocalStore(_Named):
    """A folder on a local or shared disk. It can be pickled for another process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shown = folder, str(folder)

    def path(self, name: str) -> Path:
        """The path of a file."""
        return self.folder / self._check(name)

    def address(self, name: str) -> str:
        """The path or URL of a file, as `latentae.data.sources` reads it."""
        return str(self.path(name))

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every file except temporary ones, by name."""

        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise self._failed("read", str(error.filename or self.folder), error) from error

        found: dict[str, int] = {}
        for folder, _, files in os.walk(self.folder, onerror=fail, followlinks=True):
            prefix = Path(folder).relative_to(self.folder)
            for file in files:
                if not file.endswith(INCOMPLETE):
                    with suppress(FileNotFoundError):  # removed since the listing
                        found[(prefix / file).as_posix()] = Path(folder, file).stat().st_size
        return found

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, or None if it does not exist."""
        return self._if_there("read", name, Path.read_bytes)

    def size(self, name: str) -> int | None:
        """Size of a file in bytes, or None if it does not exist."""
        return self._if_there("read", name, lambda path: path.stat().st_size)

    def write(self, name: str) -> AbstractContextManager[Path]:
        """Yield a local path to write to. It becomes `name`, or is removed on any error."""
        return atomic_file(self.path(name))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file atomically."""
        with self.write(name) as path:
            path.write_bytes(data)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        self._if_there("remove", name, Path.unlink)

    def claim(self, verb: str, inputs: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> Job:
        """Start or resume a job in this folder; see `Job.open`, whose errors it raises."""
        return Job.open(self.folder, verb, inputs, notes)

    def record(self) -> dict[str, Any]:
        """The record of the folder's job; see `Job.read`, whose errors it raises."""
        return Job.read(self.folder)

    def remove_leftovers(self) -> None:
        """Remove temporary files of crashed writers, anywhere in the folder."""
        for leftover in self.folder.rglob(f".*{INCOMPLETE}"):
            if abandoned(leftover):
                leftover.unlink(missing_ok=True)  # another task may be faster

    def _if_there(self, action: str, name: str, call: Callable[[Path], _T]) -> _T | None:
        try:
            return call(self.path(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._failed(action, self.show(name), error) from error

    def _failed(self, action: str, what: str, error: OSError) -> OutputError:
        reason = error.strerror or error
        return OutputError(f"could not {action} {what}: {reason}; check the disk and its permissions")


class _DamagedUploadError(Exception):
    """An upload came back with other bytes."""


class RemoteStore(_Named):
    """A folder on an fsspec file system, with the methods of LocalStore."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.shown = shown(self.url)
        _ = self._fs  # fails now if the address is invalid

    @property
    def _fs(self) -> tuple[Any, str]:
        """File system and root. fsspec caches one per process; it must not cross a fork."""
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

    def address(self, name: str) -> str:
        """The URL of a file, with its credentials."""
        return f"{self.url}/{self._check(name)}"

    def sizes(self) -> dict[str, int]:
        """Sizes by name, from one listing."""

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
        """The bytes of a file."""
        fs, path = self._at(name)
        return self._try(f"read {name}", lambda: fs.cat_file(path))

    def size(self, name: str) -> int | None:
        """Size of a file in bytes."""
        fs, path = self._at(name)

        def once() -> int | None:
            fs.invalidate_cache()
            info = fs.info(path)
            return int(info["size"]) if info["type"] == "file" else None

        return self._try(f"read the size of {name}", once)

    @contextmanager
    def write(self, name: str) -> Iterator[Path]:
        """Yield a path in a temporary folder, uploaded at the end."""
        self._check(name)
        with tempfile.TemporaryDirectory(prefix="latentae-") as folder:
            path = Path(folder) / PurePosixPath(name).name
            try:
                yield path
                digest, size = sha256(path), path.stat().st_size
            except OSError as error:
                reason, advice = error.strerror or error, write_advice(error.errno)
                raise OutputError(
                    f"could not write {name} to a temporary folder: {reason}; {advice} (TMPDIR)"
                ) from error
            self._upload(path, name, digest, size)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Upload a small file without a local copy."""
        self._upload(data, name, hashlib.sha256(data).hexdigest(), len(data))

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        fs, path = self._at(name)
        self._try(f"remove {name}", lambda: fs.rm_file(path))

    def claim(self, verb: str, inputs: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> Job:
        """See `Job.open`."""
        there = self.read(RECORD)
        record = None if there is None else Job.parse(there, self.show(RECORD))
        others = sorted(set(self.sizes()) - {RECORD}) if there is None else []
        write = partial(self.write_bytes, RECORD)
        return Job.claim(self.shown, record, others, verb, inputs, write, notes)

    def remove_leftovers(self) -> None:
        """Nothing: a remote listing does not show whose temporary files are in use."""

    def record(self) -> dict[str, Any]:
        """See `Job.read`."""
        return Job.parse(self.read(RECORD), self.show(RECORD))

    def _upload(self, data: Path | bytes, name: str, digest: str, size: int) -> None:
        fs, path = self._at(name)
        # fsspec's asynchronous file systems are object stores, which show only complete files.
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
        except _DamagedUploadError as error:
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
            raise _DamagedUploadError("the file was missing after the upload") from error
        if length != size or found.hexdigest() != digest:
            raise _DamagedUploadError(f"the upload came back with other bytes ({length} of {size})")

    def _try(self, what: str, once: Callable[[], _T], *, missing: bool = True) -> _T | None:
        """Call `once` with retries and growing waits. With `missing`, None for a missing file."""
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
                permanent = PermissionError | NotImplementedError | IsADirectoryError | NotADirectoryError
                if tries <= len(WAITS) and not isinstance(error, permanent):
                    time.sleep(WAITS[tries - 1] * (0.5 + random.random()))
                    continue
                if isinstance(error, _DamagedUploadError):
                    raise
                reason = " ".join(str(error).replace(self.url, self.shown).split()) or type(error).__name__
                raise OutputError(
                    f"could not {what} at {self.shown} ({reason}) in {tries} tries; check the address, your "
                    "access and the free space, then run the same command again"
                ) from error


Store = LocalStore | RemoteStore


def open_store(out: str | Path) -> Store:
    """The output folder at a path or URL. Reads and creates nothing.

    Raises:
        MissingDependencyError: the file system needs a package that is not installed.
        OutputError: fsspec does not know the address.
    """
    text = str(out).removeprefix("file://")
    return RemoteStore(text) if is_remote(text) else LocalStore(Path(text))

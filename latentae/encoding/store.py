"""An output folder, on a disk or on any file system that fsspec knows: files in it are whole, or not there.

On a disk a file gets its name by a rename after fsync; for other file systems see remote_store.py.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from latentae.data.sources import is_remote
from latentae.errors import OutputError
from latentae.files import INCOMPLETE, atomic_file
from latentae.jobs import Job, RemoteJob

__all__ = ["LocalStore", "Store"]

_BLOCK = 1 << 22


class Store(ABC):
    """An output folder. Cheap to make, and to pickle for another process; `Store.open` makes the right one.

    A name is a path inside the folder with forward slashes. Every method may raise OutputError: the file system fails, or the
    name points outside.
    """

    is_local: bool

    @staticmethod
    def open(out: str | Path) -> Store:
        """The output folder at a path or URL; nothing is read or made yet.

        Raises:
            MissingDependencyError: the file system needs a package that is not there.
            OutputError: fsspec does not know the address.
        """
        text = str(out).removeprefix("file://")
        if not is_remote(text):
            return LocalStore(Path(text))
        from latentae.encoding.remote_store import RemoteStore

        return RemoteStore(text)

    @property
    @abstractmethod
    def shown(self) -> str:
        """The address for messages and records, without password and query."""

    def show(self, name: str) -> str:
        """The address of a file, for messages."""
        return f"{self.shown}/{name}"

    def local(self, name: str | None = None) -> Path:
        """The path of a file on this machine, or of the folder; OutputError for a remote store."""
        raise OutputError(
            f"{self.show(name) if name else self.shown} is not on this machine; choose a local folder"
        )

    def names(self) -> list[str]:
        """All files, sorted; those on their way to another name left out. One listing."""
        return sorted(self.sizes())

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """All files and their sizes in bytes, as `names`."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A whole file; None if it is not there."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there."""

    @abstractmethod
    @contextmanager
    def reader(self, name: str) -> Iterator[BinaryIO]:
        """A file, open for reading at any place; DataError or OSError if it is not there or can't be read."""

    @abstractmethod
    @contextmanager
    def write(self, name: str) -> Iterator[Path]:
        """Yield a path on this machine to write to; on success it becomes `name`, on any error nothing is left."""

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file, whole or not at all."""
        with self.write(name) as path:
            path.write_bytes(data)

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file if it is there."""

    @abstractmethod
    def claim(
        self, verb: str, inputs: Mapping[str, Any], notes: Mapping[str, Any] | None = None
    ) -> Job | RemoteJob:
        """Make this folder a job's, or find that it is; see `Job.open`, whose errors it raises."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What job the folder is of; see `Job.read`, whose errors it raises."""

    def sha256(self, name: str) -> str:
        """Hex SHA-256 of a file, read in blocks."""
        digest = hashlib.sha256()
        with self.reader(name) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def _check(self, name: str) -> str:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or name != str(path):
            raise OutputError(f"{name!r} is no name of a file in {self.shown}; what holds it is damaged")
        return name


class LocalStore(Store):
    """A folder on a disk of this machine, or one that it shares with others."""

    is_local = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def shown(self) -> str:
        """The path as given."""
        return str(self.folder)

    def local(self, name: str | None = None) -> Path:
        """The path of a file, or of the folder."""
        return self.folder if name is None else self.folder / self._check(name)

    def sizes(self) -> dict[str, int]:
        """All files and their sizes, found in one walk."""
        found: dict[str, int] = {}
        pending = [(self.folder, "")]
        while pending:
            folder, prefix = pending.pop()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.is_dir():
                            pending.append((Path(entry.path), f"{prefix}{entry.name}/"))
                        elif not entry.name.endswith(INCOMPLETE):
                            with suppress(FileNotFoundError):  # gone since the listing
                                found[prefix + entry.name] = entry.stat().st_size
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self._unreadable(str(folder), error) from error
        return found

    def read(self, name: str) -> bytes | None:
        """A whole file."""
        try:
            return self.local(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._unreadable(self.show(name), error) from error

    def size(self, name: str) -> int | None:
        """Bytes of a file."""
        try:
            return self.local(name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._unreadable(self.show(name), error) from error

    @contextmanager
    def reader(self, name: str) -> Iterator[BinaryIO]:
        """A file, open for reading."""
        with self.local(name).open("rb") as file:
            yield file

    @contextmanager
    def write(self, name: str) -> Iterator[Path]:
        """A path beside the file, renamed to it at the end."""
        with atomic_file(self.local(name)) as path:
            yield path

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        try:
            self.local(name).unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise OutputError(
                f"could not remove {self.show(name)}: {error.strerror}; check its permissions"
            ) from error

    def claim(self, verb: str, inputs: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> Job:
        """See `Job.open`."""
        return Job.open(self.folder, verb, inputs, notes)

    def record(self) -> dict[str, Any]:
        """See `Job.read`."""
        return Job.read(self.folder)

    def _unreadable(self, what: str, error: OSError) -> OutputError:
        return OutputError(
            f"could not read {what}: {error.strerror or error}; check the disk and its permissions"
        )

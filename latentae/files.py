"""Files and folders that are written completely or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from latentae.errors import LatentAEError, OutputError

__all__ = [
    "INCOMPLETE",
    "abandoned",
    "alive",
    "alone",
    "atomic_file",
    "here",
    "json_bytes",
    "read_json",
    "sha256",
    "staged_folder",
    "write_advice",
    "write_bytes",
    "write_json",
    "write_text",
]

INCOMPLETE = ".incomplete"  # suffix of files that are being written, or that a crashed process left
STALE_SECONDS = 600.0  # a living writer touches its file more often, also on another machine
_CAN_NOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_CAN_NOT_LIST = (errno.EACCES, errno.EPERM, errno.EISDIR)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; it is renamed to `path`, or removed on any error.

    The file gets the permissions that the umask gives to a new file, even if its writer chose
    others, as safetensors does.

    Raises:
        OutputError: the file can't be written.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with _as_output_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            if temporary.stat().st_mode != mode:
                temporary.chmod(stat.S_IMODE(mode))
            _fsync(temporary)
            temporary.replace(path)
            _fsync(path.parent)
    finally:
        with suppress(OSError):  # if the parent is a file, the first error says more
            temporary.unlink(missing_ok=True)


@contextmanager
def staged_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; it is renamed to `path`, or removed on any error.

    Raises:
        OutputError: `path` is not an empty folder (checked first), or can't be written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path} already exists and is not an empty folder; choose another output")
    staging = _temporary(path)
    try:
        with _as_output_error(path):
            staging.mkdir(parents=True)
            yield staging
            for entry in (*sorted(staging.rglob("*")), staging):
                _fsync(entry)
            if path.exists():
                path.rmdir()
            staging.replace(path)
            _fsync(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """A name next to `path` that no other process uses, on any machine that shares the disk."""
    tail = f".{here()}.{os.getpid()}{INCOMPLETE}"
    name = path.name
    if len(os.fsencode(f".{name}{tail}")) > 255:  # a name that just fits the file system
        name = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    return path.with_name(f".{name}{tail}")


def here() -> str:
    """Scope of process numbers: this machine or container."""
    with suppress(OSError):  # only Linux has it
        return f"{platform.node()}-{Path('/proc/self/ns/pid').stat().st_ino}"
    return platform.node()


def _fsync(path: Path) -> None:
    """Flush a file or the names in a folder; some file systems (FUSE, network disks) can't."""
    if os.name == "nt":  # Windows can't open a folder to flush it, and flushes files on close
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        unlisted = path.is_dir() and error.errno in _CAN_NOT_LIST  # writable, but can't be listed
        if error.errno not in _CAN_NOT_FLUSH and not unlisted:
            raise


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    """A failed write as one line; safetensors has its own error, which ends in "(os error 28)"."""
    try:
        yield
    except LatentAEError:
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if code is None and not isinstance(error, OSError):
            raise
        reason = error if code is None else os.strerror(code)
        raise OutputError(f"could not write {path}: {reason}; {write_advice(code)}") from error


def write_advice(number: int | None) -> str:
    """What to do about a failed write, by its errno."""
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free the space or choose another folder"
    if number == errno.ENAMETOOLONG:
        return "choose a shorter name"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a folder that you can write to"
    return "choose another folder"


def abandoned(path: Path) -> bool:
    """Whether an `*.incomplete` file has no writer: its process ended, or it is old.

    A missing file is not abandoned: its writer has just renamed or removed it.
    """
    try:
        idle = time.time() - path.stat().st_mtime
    except OSError:
        return False
    owner, _, number = path.name.removesuffix(INCOMPLETE).rpartition(".")
    ended = owner.endswith(f".{here()}") and number.isdecimal() and not alive(int(number))
    return idle > STALE_SECONDS or ended


def alive(process: int) -> bool:
    """Whether a process of this machine is running."""
    if os.name == "nt":  # there, signal 0 ends a process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's
        return True
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait for other processes in this block for `folder`, and keep others waiting.

    The system releases the lock if a process dies.
    """
    if os.name == "nt":  # Windows can't lock a folder
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network disk without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically; surrogates of file names become escapes such as \\udce9."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically, indented, with keys in the given order."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The content of a JSON file; surrogates of file names are escaped and read back."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode("utf-8", "backslashreplace")


def read_json(path: str | Path) -> Any:
    """Read a UTF-8 JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

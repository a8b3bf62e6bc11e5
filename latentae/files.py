"""Files that are either whole or not there: temporary name, fsync, rename."""

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
    "write_json",
    "write_text",
]

INCOMPLETE = ".incomplete"  # files so named are on their way to another name, or were left by the dead
_CAN_NOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
STALE_SECONDS = 600.0  # a living writer touches its file more often, also one on another machine


def _fsync(path: Path) -> None:
    """Flush a file or the names in a folder. A file system that can't flush (FUSE, some network disks) is no error."""
    if os.name == "nt":  # Windows can't open a folder to flush it, and flushes files on close
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        opened = path.is_dir() and error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EISDIR,
        )  # it may be written but not listed
        if error.errno not in _CAN_NOT_FLUSH and not opened:
            raise


def write_advice(number: int | None) -> str:
    """What to do about a failed write, by its errno."""
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free the space or choose another folder"
    if number == errno.ENAMETOOLONG:
        return "choose a shorter name"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a folder that you can write to"
    return "choose another folder"


def _beside(path: Path) -> Path:
    """A name that no other process, here or on another machine that shares the disk, uses at the same time."""
    tail = f".{here()}.{os.getpid()}{INCOMPLETE}"
    name = path.name
    if len(os.fsencode(f".{name}{tail}")) > 255:  # a name that just fits the file system
        name = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    return path.with_name(f".{name}{tail}")


def here() -> str:
    """Where a process number means one process: this machine, or a container, which may have its machine's name and numbers of its own."""
    with suppress(OSError):  # only Linux has it
        return f"{platform.node()}-{Path('/proc/self/ns/pid').stat().st_ino}"
    return platform.node()


def abandoned(path: Path) -> bool:
    """Whether nobody will finish this `*.incomplete`: its process ended on this machine, or nobody wrote to it for STALE_SECONDS.

    A file that is gone is not abandoned: its writer has just given it its name, or removed it.
    """
    try:
        idle = time.time() - path.stat().st_mtime
    except OSError:
        return False
    owner, _, number = path.name.removesuffix(INCOMPLETE).rpartition(".")
    return idle > STALE_SECONDS or (
        owner.endswith(f".{here()}") and number.isdecimal() and not alive(int(number))
    )


def alive(process: int) -> bool:
    """Whether a process of this machine has not ended."""
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
def _as_output_error(path: Path) -> Iterator[None]:
    """A failed write as one line. safetensors, written in Rust, has an error of its own that ends in "(os error 28)"."""
    try:
        yield
    except LatentAEError:
        raise
    except Exception as error:
        code = _errno(error)
        if code is None and not isinstance(error, OSError):
            raise
        reason = error if code is None else os.strerror(code)
        raise OutputError(f"could not write {path}: {reason}; {write_advice(code)}") from error


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it becomes `path`, on any error it is removed.

    The file has the permissions that the umask gives to a new file there, even if its writer chose others, as safetensors does.
    """
    path = Path(path)
    temporary = _beside(path)
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
        with suppress(OSError):  # a parent that is a file: the error on its way says so better
            temporary.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block for `folder`, and keep others waiting; the system lets go when a process dies."""
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


@contextmanager
def staged_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path`, on any error it is removed.

    An empty folder at `path` is replaced; anything else there is an error before work begins.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path} already exists and is not an empty folder; choose another output")
    staging = _beside(path)
    try:
        with _as_output_error(path):
            staging.mkdir(parents=True)
            yield staging
            for entry in sorted(staging.rglob("*")):
                _fsync(entry)
            _fsync(staging)  # the names in it, too, before it gets its own
            if path.exists():
                path.rmdir()
            staging.replace(path)
            _fsync(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically; what is not UTF-8 in names of files (surrogates) becomes an escape such as \\udce9."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically, indented, keys in the order given."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The content of a JSON file. What is not UTF-8 in names of files is escaped, and read back unchanged."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(
        "utf-8", "backslashreplace"
    )


def read_json(path: str | Path) -> Any:
    """Read a UTF-8 JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Remote files through fsspec: ranges and streams that survive server errors, cut streams and silence, within limits.

HTTP is asked directly through fsspec's session, so that a cut stream goes on where it broke off and a server that ignores ranges
is noticed; all other file systems through fsspec's `cat_file`. Nothing is kept across a fork: fsspec makes a file system for each
process and thread.
"""

from __future__ import annotations

import asyncio
import fnmatch
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from latentae.data.sources import ByteStream, shown
from latentae.errors import LatentAEError, MissingDependencyError, ShardError
from latentae.progress import say

__all__ = ["Patience", "find", "read_range", "size_of", "sizes_of", "stream"]

_T = TypeVar("_T")
_PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
}
_BLOCK = 1 << 23  # bytes of one request of a stream, other than HTTP
_LISTED = 16  # files of one folder, from which on it is listed rather than asked for each
_ASKING = 16  # requests for sizes at a time
_PASSING = (408, 425, 429)  # client errors that may pass; of the others only server errors may


@dataclass(frozen=True)
class Patience:
    """How long one read is tried.

    Attributes:
        seconds: for all tries together, besides what its bytes need at `slowest`.
        first: wait before the second try; doubled after each, up to `longest`.
        longest: see `first`.
        silence: one try ends after so many seconds, besides what its bytes need at `slowest`.
        slowest: bytes per second.
    """

    seconds: float = 300.0
    first: float = 0.5
    longest: float = 30.0
    silence: float = 60.0
    slowest: float = 65536.0


patience = Patience()


def size_of(path: str) -> int:
    """Bytes of a remote file; errors as `sources.size_of`."""
    fs, key = _open_fs(path)
    if _is_http(path):
        return _try(path, "the size", 0, lambda seconds: _sync(fs, _http_size, fs, key, seconds))
    size = _try(path, "the size", 0, lambda seconds: fs.info(key).get("size"))
    if not isinstance(size, int):
        raise ShardError(
            f"the server does not say how long {shown(path)} is; copy the shard to a local folder"
        )
    return size


def sizes_of(paths: Sequence[str]) -> list[int]:
    """Bytes of each file, from one listing for each folder that many of them are in; errors as `sources.size_of`.

    HTTP servers are asked for each file: a listing of theirs has no sizes that could be trusted.
    """
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(path.rpartition("/")[0], []).append(path)
    known: dict[str, int] = {}
    for folder, inside in folders.items():
        if len(inside) >= _LISTED and not _is_http(folder):
            known.update(_listed(folder))
    with ThreadPoolExecutor(_ASKING) as pool:
        return list(pool.map(lambda path: known[path] if path in known else size_of(path), paths))


def _listed(folder: str) -> dict[str, int]:
    """The files of a folder and their sizes, where the listing has them."""
    fs, key = _open_fs(folder)

    def once(seconds: float) -> list[dict[str, Any]]:
        fs.invalidate_cache()
        return fs.ls(key, detail=True)

    rows = _try(folder, "the list of files", 0, once)
    return {
        f"{folder}/{row['name'].rpartition('/')[2]}": row["size"]
        for row in rows
        if isinstance(row.get("size"), int)
    }


def read_range(path: str, start: int, stop: int) -> bytes:
    """A range of a remote file; errors as `sources.read_range`."""
    fs, key = _open_fs(path)
    out = bytearray()

    def once(seconds: float) -> None:
        """Add to what earlier tries have brought."""
        at = start + len(out)
        if _is_http(path):
            _sync(fs, _http_range, fs, key, at, stop, out, seconds)
        else:
            _add(out, fs.cat_file(key, start=at, end=stop), stop - at)
        if len(out) < stop - start:
            raise ConnectionError(f"the stream ended at byte {start + len(out)} of {stop}")

    _try(path, f"bytes {start} to {stop}", stop - start, once)
    return bytes(out)


@contextmanager
def stream(path: str) -> Iterator[ByteStream]:
    """A whole remote file from its beginning; errors as `sources.stream`."""
    file = (_HttpStream if _is_http(path) else _BlockStream)(path)
    try:
        yield file
    finally:
        file.close()


def find(pattern: str) -> list[str]:
    """The remote files that match a glob, sorted.

    Raises:
        ShardError: the server can't be reached or does not list its files.
    """
    fs, key = _open_fs(pattern)
    folder, _, name = key.rpartition("/")

    def once(seconds: float) -> list[str]:
        if re.search(r"[*\[]", folder):
            return [str(path) for path in fs.glob(key)]
        try:
            rows = fs.ls(folder + "/" if _is_http(pattern) else folder, detail=False)
        except FileNotFoundError:
            return []
        return [path for path in rows if fnmatch.fnmatchcase(path.rpartition("/")[2], name)]

    found = _try(pattern, "the list of files", 0, once)
    return sorted({path if _is_http(pattern) else fs.unstrip_protocol(path) for path in found})


def _is_http(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _open_fs(path: str) -> tuple[Any, str]:
    """The file system of a URL and the file's name in it."""
    scheme = path.partition("://")[0]
    try:
        import fsspec
        from fsspec.config import conf
        from fsspec.core import url_to_fs

        if not _is_http(path):
            return url_to_fs(path)
        import aiohttp

        chosen = conf.get(scheme, {}).get("client_kwargs", {})
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=patience.silence, sock_read=patience.silence)
        return fsspec.filesystem(
            scheme, client_kwargs={"timeout": timeout, "trust_env": True, **chosen}
        ), path
    except ImportError as error:
        package = _PACKAGES.get(scheme, "the package that fsspec asks for")
        raise MissingDependencyError(
            f"{scheme}:// needs {package} ({_reason(error, path)}); install it with pip and try again"
        ) from error
    except ValueError as error:
        raise ShardError(
            f"{shown(path)} can't be opened ({_reason(error, path)}); use a scheme that fsspec knows"
        ) from error


def _add(out: bytearray, data: bytes, most: int) -> None:
    if len(data) > most:
        raise ValueError(f"{len(data)} bytes came, expected {most}: it ignores ranges")
    out += data


def _try(path: str, what: str, count: int, once: Callable[[float], _T]) -> _T:
    """Call `once(seconds it may take)` until it returns, with growing waits, within the limit for `count` bytes."""
    began = time.monotonic()
    limit = patience.seconds + count / patience.slowest
    tries = 0
    while True:
        left = limit - (time.monotonic() - began)
        try:
            return once(min(patience.silence + count / patience.slowest, left))
        except LatentAEError:
            raise
        except Exception as error:
            tries += 1
            reason = _reason(error, path)
            if not _may_pass(error):
                found = "there is no such file" if isinstance(error, FileNotFoundError) else reason
                raise ShardError(
                    f"shard {shown(path)} can't be read ({found}); check the address and your access"
                ) from error
            wait = min(patience.first * 2 ** (tries - 1), patience.longest) * (0.5 + random.random())
            if time.monotonic() - began + wait >= limit:
                raise ShardError(
                    f"could not read {what} of {shown(path)} in {tries} tries over {time.monotonic() - began:.0f} s "
                    f"(last: {reason}); check the server and run the same command again"
                ) from error
            if tries == 3:
                say(f"{shown(path)}: {reason}; trying again for up to {limit:.0f} s")
            time.sleep(wait)


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and status >= 400:
        return status >= 500 or status in _PASSING
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    return not isinstance(
        error, ImportError | ValueError | TypeError | KeyError | NotImplementedError | AttributeError
    )


def _reason(error: BaseException, path: str) -> str:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"HTTP {status} {getattr(error, 'message', '')}".strip()
    lines = str(error).replace(path, shown(path)).splitlines()
    return (
        lines[0] if lines else "it took too long" if isinstance(error, TimeoutError) else type(error).__name__
    )


def _sync(fs: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    from fsspec.asyn import sync

    return sync(fs.loop, function, *arguments)


class _PastEnd(ValueError):
    """A range that begins after the last byte."""


async def _http_get(fs: Any, url: str, start: int, stop: int | None) -> tuple[Any, int]:
    """An open response, and how many bytes of it come before `start`."""
    headers = {"Accept-Encoding": "identity"}  # a range of a compressed file would be a range of other bytes
    if start or stop is not None:
        headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    session = await fs.set_session()
    response = await session.get(fs.encode_url(url), headers=headers)
    try:
        if response.status == 404:
            raise FileNotFoundError(url)
        if response.status == 416:
            raise _PastEnd(f"the file ends before byte {start}: it changed or was cut short")
        response.raise_for_status()
        if response.headers.get("Content-Encoding", "identity") not in ("", "identity"):
            raise ValueError("the server sends it compressed")
        if response.status != 206:
            return response, start
        if not re.match(rf"bytes {start}-\d+/", response.headers.get("Content-Range", "")):
            raise ValueError(
                f"the server sent {response.headers.get('Content-Range')!r}, expected bytes from {start}"
            )
        return response, 0
    except BaseException:
        response.close()
        raise


async def _http_size(fs: Any, url: str, seconds: float) -> int:
    async with asyncio.timeout(seconds):
        try:
            response, _ = await _http_get(fs, url, 0, 1)  # not HEAD, which signed addresses may refuse
        except _PastEnd:
            return 0
        try:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            length = total if response.status == 206 else response.headers.get("Content-Length", "")
            if not length.isdigit():
                raise ValueError("the server does not say how long it is")
            return int(length)
        finally:
            response.close()


async def _http_range(fs: Any, url: str, start: int, stop: int, out: bytearray, seconds: float) -> None:
    """Append the bytes of a range to `out`; what has come stays there when the stream breaks."""
    async with asyncio.timeout(seconds):
        response, skip = await _http_get(fs, url, start, stop)
        try:
            if skip:
                _warn_of_ranges(url)
            await _pour(response, skip, stop - start, out)
        finally:
            response.close()


async def _pour(response: Any, skip: int, count: int, out: bytearray) -> None:
    while skip and (data := await response.content.read(min(skip, 1 << 20))):
        skip -= len(data)
    while count and (data := await response.content.read(min(count, 1 << 20))):
        count -= len(data)
        out += data


_warned: set[str] = set()


def _warn_of_ranges(url: str) -> None:
    host = shown(url).partition("://")[2].partition("/")[0]
    if host not in _warned:
        _warned.add(host)
        say(
            f"{host} does not serve ranges of files, so every read begins at the start of its shard; copy the shards here"
        )


class _HttpStream:
    """One response read to its end, asked for again from where it broke off."""

    def __init__(self, path: str) -> None:
        self._path, self._position, self._size = path, 0, size_of(path)
        self._fs, self._url = _open_fs(path)
        self._response: Any = None

    def read(self, count: int) -> bytes:
        """The next `count` bytes; fewer only at the end."""
        count = min(count, self._size - self._position)
        out = bytearray()

        def once(seconds: float) -> None:
            try:
                _sync(self._fs, self._more, count, out, seconds)
                if len(out) < count:
                    raise ConnectionError(
                        f"the stream ended at byte {self._position + len(out)} of {self._size}"
                    )
            except BaseException:
                self.close()
                raise

        if count:
            _try(self._path, f"bytes {self._position} to {self._position + count}", count, once)
        self._position += count
        return bytes(out)

    async def _more(self, count: int, out: bytearray, seconds: float) -> None:
        async with asyncio.timeout(seconds):
            skip = 0
            if self._response is None:
                self._response, skip = await _http_get(self._fs, self._url, self._position + len(out), None)
            await _pour(self._response, skip, count - len(out), out)

    def close(self) -> None:
        """Let go of the connection."""
        if self._response is not None:
            response, self._response = self._response, None
            self._fs.loop.call_soon_threadsafe(response.close)


class _BlockStream:
    """Ranges one after the other."""

    def __init__(self, path: str) -> None:
        self._path, self._position, self._size = path, 0, size_of(path)
        self._rest = b""

    def read(self, count: int) -> bytes:
        """The next `count` bytes; fewer only at the end."""
        while len(self._rest) < count and self._position < self._size:
            stop = min(self._position + max(_BLOCK, count - len(self._rest)), self._size)
            self._rest += read_range(self._path, self._position, stop)
            self._position = stop
        data, self._rest = self._rest[:count], self._rest[count:]
        return data

    def close(self) -> None:
        """Nothing is held open."""

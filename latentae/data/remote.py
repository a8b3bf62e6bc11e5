"""Remote files through fsspec: ranges and streams, with retries.

HTTP requests use fsspec's session directly, so that a broken stream resumes and a server that
ignores ranges is noticed. All other file systems use fsspec's `cat_file`. Nothing is shared across
a fork: fsspec creates a file system per process and thread.
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
from functools import cache
from typing import Any, Protocol, TypeVar

from latentae.errors import LatentAEError, MissingDependencyError, ShardError, first_line
from latentae.progress import say

__all__ = [
    "ByteStream",
    "Patience",
    "find",
    "is_remote",
    "read_range",
    "shown",
    "size_of",
    "sizes_of",
    "stream",
]

_T = TypeVar("_T")
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")  # two letters or more: C:// is a drive
_BLOCK = 1 << 23  # bytes per request of a stream, except HTTP
_LISTED = 16  # files of one folder from which the folder is listed, instead of one request per file
_REQUESTS = 16  # requests for sizes in parallel
_TEMPORARY = (408, 425, 429)  # client errors that are retried, like all server errors


@dataclass(frozen=True)
class Patience:
    """Retry limits of one read.

    Attributes:
        seconds: total time for all tries, plus the time of the bytes at `slowest`.
        first: wait before the second try in seconds. It doubles after each try, up to `longest`.
        longest: see `first`.
        silence: timeout of one try in seconds, plus the time of the bytes at `slowest`.
        slowest: bytes per second.
    """

    seconds: float = 300.0
    first: float = 0.5
    longest: float = 30.0
    silence: float = 60.0
    slowest: float = 65536.0


patience = Patience()


class ByteStream(Protocol):
    """A file that is read from its beginning to its end, as `stream` returns it."""

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
    """A path for messages and records: URLs without password and query (signatures)."""
    if not is_remote(path):
        return path
    scheme, _, rest = path.partition("://")
    host, slash, tail = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{tail}"


def size_of(path: str) -> int:
    """Bytes of a remote file; errors as `sources.size_of`."""
    fs, key = _open_fs(path)
    if _is_http(path):
        return _try(path, "the size", 0, lambda seconds: _sync(fs, _http_size, fs, key, seconds))
    size = _try(path, "the size", 0, lambda seconds: fs.info(key).get("size"))
    if not isinstance(size, int):
        raise ShardError(f"the server does not report the size of {shown(path)}; copy the shard here")
    return size


def sizes_of(paths: Sequence[str]) -> list[int]:
    """Bytes of each file, from one listing per folder if many files share it.

    Errors as `sources.size_of`.

    HTTP servers get one request per file: their listings have no reliable sizes.
    """
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(path.rpartition("/")[0], []).append(path)
    known: dict[str, int] = {}
    for folder, inside in folders.items():
        if len(inside) >= _LISTED and not _is_http(folder):
            known.update(_listed(folder))
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(lambda path: known[path] if path in known else size_of(path), paths))


def _listed(folder: str) -> dict[str, int]:
    """The files of a folder whose sizes are in its listing."""
    fs, key = _open_fs(folder)

    def once(seconds: float) -> list[dict[str, Any]]:
        fs.invalidate_cache()
        return fs.ls(key, detail=True)

    rows = [row for row in _try(folder, "the list of files", 0, once) if isinstance(row.get("size"), int)]
    return {f"{folder}/{row['name'].rpartition('/')[2]}": row["size"] for row in rows}


def read_range(path: str, start: int, stop: int) -> bytes:
    """A range of a remote file; errors as `sources.read_range`."""
    fs, key = _open_fs(path)
    out = bytearray()

    def once(seconds: float) -> None:
        """Append to the bytes of earlier tries."""
        at = start + len(out)
        if _is_http(path):
            _sync(fs, _http_range, fs, key, at, stop, out, seconds)
        else:
            data = fs.cat_file(key, start=at, end=stop)
            if len(data) > stop - at:
                raise ValueError(f"received {len(data)} bytes, expected {stop - at}: it ignores ranges")
            out.extend(data)
        if len(out) < stop - start:
            raise ConnectionError(f"the stream ended at byte {start + len(out)} of {stop}")

    _try(path, f"bytes {start} to {stop}", stop - start, once)
    return bytes(out)


@contextmanager
def stream(path: str) -> Iterator[ByteStream]:
    """Stream a remote file from its beginning; errors as `sources.stream`."""
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
    """The file system of a URL, and the file's name in it."""
    scheme = path.partition("://")[0]
    try:
        import fsspec
        from fsspec.config import conf
        from fsspec.core import url_to_fs

        if not _is_http(path):
            return url_to_fs(path)
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=patience.silence, sock_read=patience.silence)
        options = {"timeout": timeout, "trust_env": True, **conf.get(scheme, {}).get("client_kwargs", {})}
        return fsspec.filesystem(scheme, client_kwargs=options), path
    except ImportError as error:
        found = f"{scheme}:// needs another package ({_reason(error, path)})"
        raise MissingDependencyError(f"{found}; install it with pip and try again") from error
    except ValueError as error:
        found = f"{shown(path)} can't be opened ({_reason(error, path)})"
        raise ShardError(f"{found}; use a scheme that fsspec knows") from error


def _try(path: str, what: str, count: int, once: Callable[[float], _T]) -> _T:
    """Call `once(timeout)` until it returns, with growing waits, within a limit."""
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
                message = f"shard {shown(path)} can't be read ({found}); check the address and your access"
                raise ShardError(message) from error
            wait = min(patience.first * 2 ** (tries - 1), patience.longest) * (0.5 + random.random())
            if time.monotonic() - began + wait >= limit:
                found = f"{what} of {shown(path)} in {tries} tries over {time.monotonic() - began:.0f} s"
                advice = "check the server and run the same command again"
                raise ShardError(f"could not read {found} (last: {reason}); {advice}") from error
            if tries == 3:
                say(f"{shown(path)}: {reason}; retrying for up to {limit:.0f} s")
            time.sleep(wait)


def _may_pass(error: Exception) -> bool:
    """Whether the request may succeed later: server errors, broken connections, timeouts."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and status >= 400:
        return status >= 500 or status in _TEMPORARY
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    ours = ImportError | ValueError | TypeError | KeyError | NotImplementedError | AttributeError
    return not isinstance(error, ours)


def _reason(error: BaseException, path: str) -> str:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"HTTP {status} {getattr(error, 'message', '')}".strip()
    if isinstance(error, TimeoutError) and not str(error):
        return "it took too long"
    return first_line(error).replace(path, shown(path))


def _sync(fs: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    from fsspec.asyn import sync

    return sync(fs.loop, function, *arguments)


class _PastEnd(ValueError):
    """A range that begins after the last byte."""


async def _http_get(fs: Any, url: str, start: int, stop: int | None) -> tuple[Any, int]:
    """An open response, and its number of bytes before `start`."""
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
            sent = response.headers.get("Content-Range")
            raise ValueError(f"the server sent {sent!r}, expected bytes from {start}")
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
                raise ValueError("the server does not report its size")
            return int(length)
        finally:
            response.close()


async def _http_range(fs: Any, url: str, start: int, stop: int, out: bytearray, seconds: float) -> None:
    """Append the bytes of a range to `out`. Received bytes stay there when the stream breaks."""
    async with asyncio.timeout(seconds):
        response, skip = await _http_get(fs, url, start, stop)
        try:
            if skip:
                _warn_of_ranges(shown(url).partition("://")[2].partition("/")[0])
            await _pour(response, skip, stop - start, out)
        finally:
            response.close()


async def _pour(response: Any, skip: int, count: int, out: bytearray) -> None:
    while skip and (data := await response.content.read(min(skip, 1 << 20))):
        skip -= len(data)
    while count and (data := await response.content.read(min(count, 1 << 20))):
        count -= len(data)
        out += data


@cache
def _warn_of_ranges(host: str) -> None:
    say(f"{host} does not serve ranges, so every read starts at the start of a shard; copy the shards here")


class _HttpStream:
    """One response, requested again from the break when it is interrupted."""

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
                    at = self._position + len(out)
                    raise ConnectionError(f"the stream ended at byte {at} of {self._size}")
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
        """Close the connection."""
        if self._response is not None:
            response, self._response = self._response, None
            self._fs.loop.call_soon_threadsafe(response.close)


class _BlockStream:
    """A stream of consecutive range requests."""

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
        """Nothing is open between reads."""

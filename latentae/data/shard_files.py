"""Shards by name, and their samples, in tar order or by an index.

A complete shard is read or none of it: all headers are checked before the first sample is yielded.
Nothing is decoded here, so nothing is unpickled, and no URL runs a program.
"""

from __future__ import annotations

import glob
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import braceexpand

from latentae.data import remote
from latentae.data.headers import IMAGE_EXTENSIONS
from latentae.data.shard_index import ShardIndex
from latentae.data.sources import copy_to, is_remote, read_range, shown, size_of, will_read
from latentae.data.tars import Member, Reader, Sample, group, refuse_damaged, walk, walk_samples
from latentae.errors import ShardError

__all__ = ["READ_EXTENSIONS", "RawSample", "expand_shards", "read_samples", "read_shard", "shard_keys"]

RawSample = dict[str, Any]
"""Member extension (lower case, no dot) -> bytes; "__key__" and "__url__" (the shard) -> str."""

Members = Sequence[tuple[str, int, int]]

READ_EXTENSIONS = frozenset({*IMAGE_EXTENSIONS, "txt", "json", "cls", "caption"})  # what training reads

_HINT = "pass a folder of .tar files, a file, a glob or a brace pattern such as {000..099}.tar"
_GAP = 1 << 20  # bytes between two remote samples up to which one request fetches both
_WASTE = 1 << 20  # bytes of unused members up to which a local sample is read at once
_AHEAD = 1 << 26  # bytes that the system is asked to read ahead


def expand_shards(spec: str | Path | Sequence[str | Path]) -> list[str]:
    """The shards that a specification names, in order.

    Args:
        spec: a folder (its `*.tar`, sorted), a file, a glob, a brace pattern, several joined by
            `::`, or a sequence. URLs of any scheme that fsspec knows work the same way, if the
            server can list its files. Files named by a brace pattern are returned without a request
            to the server.

    Raises:
        ShardError: nothing matches, a named file is missing or named twice, or the path is a
            `pipe:`.
    """
    if isinstance(spec, str):
        paths = [path for part in spec.split("::") if part for path in _expand_one(part)]
    elif isinstance(spec, Path):
        paths = _expand_one(str(spec))
    else:
        paths = [path for part in spec for path in expand_shards(part)]
    if not paths:
        raise ShardError(f"no shards in {spec!r}; {_HINT}")
    path, count = Counter(paths).most_common(1)[0]
    if count > 1:
        raise ShardError(f"shard {shown(path)} is named twice; name each shard once")
    return paths


def _expand_one(spec: str) -> list[str]:
    spec = spec.removeprefix("file://")
    local = not is_remote(spec)
    if local and Path(spec).is_dir():
        paths = sorted(str(path) for path in Path(spec).glob("*.tar") if path.is_file())
        if not paths:
            raise ShardError(f"folder {spec} has no .tar shard; pack images with `latentae shards`")
        return paths
    if local and Path(spec).is_file():
        return [spec]
    try:
        candidates = list(braceexpand.braceexpand(spec, escape=False))
    except ValueError:
        raise ShardError(f"unbalanced braces in {shown(spec)!r}; {_HINT}") from None
    return [path for one in candidates for path in (_match(one, spec) if local else _match_remote(one))]


def _match(candidate: str, spec: str) -> list[str]:
    if Path(candidate).is_file():
        return [candidate]
    if Path(candidate).is_dir() and candidate != spec:
        return _expand_one(candidate)
    if glob.has_magic(candidate):
        paths = sorted(path for path in glob.glob(candidate) if Path(path).is_file())  # noqa: PTH207 (absolute patterns)
        if not paths:
            raise ShardError(f"no shard matches {candidate!r}; {_HINT}")
        return paths
    source = f" (from {spec!r})" if candidate != spec else ""
    raise ShardError(f"no shard {candidate}{source}; {_HINT}")


def _match_remote(candidate: str) -> list[str]:
    address = re.split(r"[?#]", candidate, maxsplit=1)[0] if candidate.startswith("http") else candidate
    pattern = re.search(r"[*\[]", address)
    if not pattern and address.endswith(".tar"):  # a missing file shows when its size is read
        return [candidate]
    paths = remote.find(candidate if pattern else candidate.rstrip("/") + "/*.tar")
    if not paths:
        raise ShardError(
            f"no shard matches {shown(candidate)}, or the server does not list its files; {_HINT}"
        )
    return paths


def shard_keys(path: str | Path) -> list[str]:
    """The keys of a shard's samples in tar order, after a check that the tar is complete.

    Raises:
        ShardError: missing, not a plain tar, cut short, damaged, or with a key that occurs twice.
    """
    with _local(str(path)) as file:
        return [sample.key for sample in _samples(str(path), file)]


def read_shard(path: str | Path) -> Iterator[RawSample]:
    """Yield the samples of a shard in tar order.

    A sample is `{"__key__": str, "__url__": shard, extension: bytes, ...}`.

    Args:
        path: an uncompressed tar in the WebDataset convention (members of a sample are
            consecutive). A remote shard is copied to a temporary file first.

    Raises:
        ShardError: as `shard_keys`. For a local shard it is raised before the first sample.
    """
    path = str(path)
    if not is_remote(path):
        return _read_samples(path, path, _samples(path, path))

    def read_copy() -> Iterator[RawSample]:
        with _local(path) as file:
            yield from _read_samples(path, file, _samples(path, file))

    return read_copy()


@contextmanager
def _local(path: str) -> Iterator[str]:
    """A local file with the bytes of a shard: itself, or a temporary copy of a remote one."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="latentae-") as folder:
        copy = Path(folder) / "shard.tar"
        copy_to(path, copy)
        yield str(copy)


def _samples(path: str, file: str) -> list[Sample]:
    """Walk all headers of the complete tar `file`; error messages call it `path`."""
    reader = Reader(partial(read_range, file), size_of(file), chunk=1 << 13)
    return list(group(walk(reader, shown(path)), partial(refuse_damaged, shown(path))))


def _read_samples(path: str, file: str, samples: list[Sample]) -> Iterator[RawSample]:
    for sample in samples:
        reader = Reader(partial(read_range, file), sample.end, start=sample.start)
        yield _read_checked(path, sample.key, sample.members, reader, None)


def read_samples(index: ShardIndex, shard: int, rows: Sequence[int]) -> Iterator[RawSample]:
    """Yield the samples in `rows` of one shard's table, in that order.

    Only images, `txt`, `json`, `cls` and `caption` are read. A local shard is read sample by
    sample. The part of a remote shard from the first to the last of `rows` is fetched at once, in
    several requests if there are large gaps.

    Args:
        index: from `load_index`.
        shard: number of the shard in it.
        rows: numbers of samples in that shard's table.

    Raises:
        ShardError: the shard can't be read, or has changed since it was indexed.
    """
    path = index.shards[shard].path
    plan = _plan(index, shard, [int(row) for row in rows])
    if is_remote(path):
        parts = _fetch(path, [span for _, _, span in plan])
        for key, members, (start, stop) in plan:
            base, data = next((b, d) for b, d in parts if b <= start and stop <= b + len(d))
            part = data[start - base : stop - base]
            reader = Reader(lambda a, b, p=part, s=start: bytes(p[a - s : b - s]), stop, start=start)
            yield _read_checked(path, key, members, reader, READ_EXTENSIONS)
        return
    if len(plan) > 1:
        first, last = min(start for *_, (start, _) in plan), max(stop for *_, (_, stop) in plan)
        will_read(path, first, min(last, first + _AHEAD))
    for key, members, (start, stop) in plan:
        unread = sum(size for extension, _, size in members if extension not in READ_EXTENSIONS)
        chunk = 1 << 13 if unread > _WASTE else stop - start
        reader = Reader(partial(read_range, path), stop, start=start, chunk=chunk)
        yield _read_checked(path, key, members, reader, READ_EXTENSIONS)


def _plan(index: ShardIndex, shard: int, rows: list[int]) -> Sequence[tuple[str, Members, tuple[int, int]]]:
    """Key, members, and first and last byte of these samples."""
    entry, table = index.shards[shard], index.table(shard)
    if rows and not 0 <= min(rows) <= max(rows) < table.samples:
        raise IndexError(f"rows {min(rows)} to {max(rows)} of a shard of {table.samples} samples")
    try:
        plan = [(table.key(row), table.members(row), table.span(row)) for row in rows]
    except (IndexError, ValueError):
        plan = None
    if plan is None or any(not start < stop <= entry.bytes for *_, (start, stop) in plan):
        path = shown(entry.path)
        raise ShardError(f"the index of shard {path} is damaged; remove it and run `latentae index` again")
    return plan


def _fetch(path: str, spans: list[tuple[int, int]]) -> list[tuple[int, memoryview]]:
    """Parts (first byte, bytes) that contain these spans, from as few requests as possible."""
    parts: list[list[int]] = []
    for start, stop in sorted(spans):
        if parts and start <= parts[-1][1] + _GAP:
            parts[-1][1] = max(parts[-1][1], stop)
        else:
            parts.append([start, stop])
    return [(start, memoryview(read_range(path, start, stop))) for start, stop in parts]


def _read_checked(
    path: str, key: str, expected: Members, reader: Reader, extensions: Collection[str] | None
) -> RawSample:
    """Read one sample by walking it again, and compare it with what the first walk found.

    Args:
        path: of the shard.
        key: of the sample.
        expected: its members: extension, first byte of the data, bytes of data.
        reader: covers the sample, from its first header to its last padding.
        extensions: of the members to read; None reads all.

    Raises:
        ShardError: the members differ.
    """
    wanted = {offset for extension, offset, _ in expected if extensions is None or extension in extensions}

    def take(member: Member) -> bytes | None:
        return reader.take(member.size) if member.offset in wanted and member.kind == "file" else None

    reason = "other members are there"
    try:
        found = list(walk_samples(reader, shown(path), take, lambda problem: None, whole=False))
        if len(found) == 1 and found[0][0].key == key and found[0][0].members == list(expected):
            return {"__key__": key, "__url__": path, **found[0][1]}
    except ShardError as error:
        reason = str(error)
    found = f"sample {key!r} is not where its index says ({reason})"
    advice = "write or fetch it again, or run `latentae index` and start again"
    raise ShardError(f"shard {shown(path)} has changed since it was indexed: {found}; {advice}")

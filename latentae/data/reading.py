"""Single samples of a shard, read where its index says they are, and checked against the headers that stand there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from latentae.data.headers import IMAGE_EXTENSIONS
from latentae.data.sources import is_remote, read_range, shown, will_read
from latentae.data.tables import SampleTable
from latentae.data.tars import Member, Reader, group, walk
from latentae.errors import ShardError

if TYPE_CHECKING:
    from latentae.data.shard_index import ShardIndex

__all__ = ["READ_EXTENSIONS", "RawSample", "read_checked", "read_samples"]

RawSample = dict[
    str, Any
]  # member extension (lower case, no dot) -> bytes; "__key__" and "__url__" (the shard) -> str

Members = Sequence[tuple[str, int, int]]

READ_EXTENSIONS = frozenset(
    {*IMAGE_EXTENSIONS, "txt", "json", "cls", "caption"}
)  # what training reads of a sample

_GAP = 1 << 20  # bytes between two samples that are fetched along rather than asked for apart, remote
_WASTE = 1 << 20  # bytes of unread members that are read along with a sample, local
_AHEAD = 1 << 26  # bytes that the system may be asked to read ahead


def read_samples(index: ShardIndex, shard: int, rows: Sequence[int]) -> Iterator[RawSample]:
    """Yield the samples of one shard that stand in `rows` of its table, in that order.

    Of each sample only images, `txt`, `json`, `cls` and `caption` are read. From a local shard one sample at a time is in memory;
    the part of a remote shard from the first to the last of `rows` is fetched at once (in several parts where much lies between).

    Args:
        index: from `load_index`.
        shard: number of the shard in it.
        rows: numbers of samples in that shard's table.

    Raises:
        ShardError: the shard can't be read, or has changed since it was indexed.
    """
    path, table = index.shards[shard].path, index.table(shard)
    plan = _plan(path, table, [int(row) for row in rows], index.shards[shard].bytes)
    if is_remote(path):
        parts = _fetch(path, [span for _, _, span in plan])
        for key, members, (start, stop) in plan:
            base, data = next(
                (base, data) for base, data in parts if base <= start and stop <= base + len(data)
            )
            part = data[start - base : stop - base]
            reader = Reader(lambda a, b, p=part, s=start: bytes(p[a - s : b - s]), stop, start=start)
            yield read_checked(path, key, members, reader, READ_EXTENSIONS)
        return
    if len(plan) > 1:
        first = min(start for _, _, (start, _) in plan)
        will_read(path, first, min(max(stop for _, _, (_, stop) in plan), first + _AHEAD))
    for key, members, (start, stop) in plan:
        unread = sum(size for extension, _, size in members if extension not in READ_EXTENSIONS)
        chunk = 1 << 13 if unread > _WASTE else stop - start
        reader = Reader(lambda a, b: read_range(path, a, b), stop, start=start, chunk=chunk)
        yield read_checked(path, key, members, reader, READ_EXTENSIONS)


def _plan(
    path: str, table: SampleTable, rows: list[int], size: int
) -> Sequence[tuple[str, Members, tuple[int, int]]]:
    """Key, members and place of these samples."""
    if rows and not 0 <= min(rows) <= max(rows) < table.samples:
        raise IndexError(f"rows {min(rows)} to {max(rows)} of a shard of {table.samples} samples")
    try:
        plan = [(table.key(row), table.members(row), table.span(row)) for row in rows]
    except (IndexError, ValueError):
        plan = None
    if plan is None or any(not start < stop <= size for _, _, (start, stop) in plan):
        raise ShardError(
            f"the index of shard {shown(path)} is damaged; remove it and run `latentae index` again"
        )
    return plan


def _fetch(path: str, spans: list[tuple[int, int]]) -> list[tuple[int, memoryview]]:
    """The bytes of these spans, in as few requests as makes sense: first byte and bytes of each part."""
    parts: list[list[int]] = []
    for start, stop in sorted(spans):
        if parts and start <= parts[-1][1] + _GAP:
            parts[-1][1] = max(parts[-1][1], stop)
        else:
            parts.append([start, stop])
    return [(start, memoryview(read_range(path, start, stop))) for start, stop in parts]


def read_checked(
    path: str, key: str, expected: Members, reader: Reader, extensions: Collection[str] | None
) -> RawSample:
    """Read one sample with the same walk that found it; it must come out the same.

    Args:
        path: of the shard.
        key: of the sample.
        expected: its members: extension, first byte of the data, bytes of data.
        reader: covers the sample, from its first header to its last padding.
        extensions: of the members to read; None is all.

    Raises:
        ShardError: other members stand there.
    """
    raw: RawSample = {"__key__": key, "__url__": path}
    wanted = {
        offset: extension
        for extension, offset, _ in expected
        if extensions is None or extension in extensions
    }

    def members() -> Iterator[Member]:
        for member in walk(reader, shown(path), whole=False):
            if member.offset in wanted and member.kind == "file":
                raw[wanted[member.offset]] = reader.take(member.size)
            yield member

    try:
        found = list(group(members(), lambda problem: None))
    except ShardError as error:
        raise _changed(path, key, str(error)) from error
    if len(found) != 1 or found[0].key != key or tuple(found[0].members) != tuple(expected):
        raise _changed(path, key, "other members stand there")
    return raw


def _changed(path: str, key: str, reason: str) -> ShardError:
    return ShardError(
        f"shard {shown(path)} has changed since it was indexed: sample {key!r} is not where its index says ({reason}); "
        "write or fetch it again, or run `latentae index` and start again"
    )

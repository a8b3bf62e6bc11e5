"""A strict walk over a tar: every member with its offsets, or an error that names the byte.

It reads plain (V7), ustar, GNU and PAX headers, including long names. Python's tarfile silently
stops at a header that it can't read. This walk ends only at the end-of-archive block, with only
zeros after it. It never writes and never follows a link.
"""

from __future__ import annotations

import io
import itertools
import operator
import re
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from latentae.errors import ShardError

__all__ = ["BLOCK", "DamagedTar", "Member", "Problem", "Reader", "Sample", "group", "walk", "walk_samples"]

_T = TypeVar("_T")
BLOCK = 512
MAX_EXTENDED = 1 << 20  # bytes of a long name or PAX header, so that a damaged size can't fill the memory

_ZEROS = bytes(BLOCK)
_KINDS = {
    **dict.fromkeys((b"0", b"\0", b"7"), "file"),
    **dict.fromkeys((b"3", b"4"), "device"),
    **{b"1": "hard link", b"2": "symbolic link", b"5": "folder", b"6": "fifo", b"S": "sparse file"},
}
_NO_DATA = frozenset({b"1", b"2", b"3", b"4", b"5", b"6"})  # for any value of their size field, POSIX ustar
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}
_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips
_SPLIT = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # webdataset's base_plus_ext
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


class DamagedTar(ShardError):
    """A file that can be read, but is not a complete tar."""


class Member(NamedTuple):
    """One entry of a tar."""

    name: str
    kind: str
    """`file`, or the type of any other entry, such as `symbolic link`."""
    start: int
    """First byte of its first header."""
    offset: int
    """First byte of its data."""
    size: int
    """Bytes of data."""
    end: int
    """First byte after the padding of its data."""


class Sample(NamedTuple):
    """Consecutive members that share a key."""

    key: str
    start: int
    end: int
    members: list[tuple[str, int, int]]
    """Extension (lower case, no dot), first byte of the data, bytes of data; in tar order."""


class Problem(NamedTuple):
    """Something in a shard that is not used.

    Attributes:
        code: `twice`, `outside` and `name` are damaged samples. `image` is a sample that is used
            although the header of its image can't be read. `left_out` is no part of a sample:
            links, hidden files, samples without an image.
    """

    code: str
    byte: int
    name: str
    reason: str


class Reader:
    """The bytes of a file in order, fetched in chunks.

    Skipped bytes are not fetched, unless every byte is observed.

    Args:
        fetch: `fetch(start, stop)` returns exactly these bytes. With `observe`, ranges ascend
            without gaps.
        stop: end of the file, or of the part to read.
        start: first byte to read.
        chunk: bytes to fetch at once.
        observe: called with every byte from `start` to `stop`, in order.
    """

    def __init__(
        self,
        fetch: Callable[[int, int], bytes],
        stop: int,
        *,
        start: int = 0,
        chunk: int = 1 << 20,
        observe: Callable[[bytes], object] | None = None,
    ) -> None:
        self.position, self.stop = start, stop
        self._fetch, self._chunk, self._observe = fetch, chunk, observe
        self._buffer, self._base = b"", start

    def take(self, count: int) -> bytes:
        """The next `count` bytes; fewer only at the end of the file."""
        begin = self.position - self._base
        if begin + count > len(self._buffer):
            self._fill(min(self.position + count, self.stop))
            begin = self.position - self._base
        found = self._buffer[begin : begin + count]
        self.position += len(found)
        return found

    def skip_to(self, position: int) -> None:
        """Skip forward to `position`."""
        position = min(position, self.stop)
        if self._observe is not None:
            while self._base + len(self._buffer) < position:
                self._base += len(self._buffer)
                self._buffer = b""
                self._load(self._base, min(self._base + self._chunk, self.stop))
        self.position = position

    def _fill(self, stop: int) -> None:
        """Fill the buffer with everything from the position to `stop`."""
        have = self._base + len(self._buffer)
        kept = self._buffer[self.position - self._base :] if self.position < have else b""
        self._base = self.position
        self._buffer = kept
        begin = max(self.position + len(kept), have if self._observe is not None else 0)
        self._load(begin, min(max(stop, begin + self._chunk), self.stop))

    def _load(self, start: int, stop: int) -> None:
        if start < stop:
            data = self._fetch(start, stop)
            if self._observe is not None:
                self._observe(data)
            self._buffer = self._buffer + data if self._buffer else data


def walk(reader: Reader, shard: str, *, whole: bool = True) -> Iterator[Member]:
    """Yield the members of a tar in order.

    After each one, the caller may read its data from `reader`.

    Args:
        reader: at the first header.
        shard: its name in error messages.
        whole: the tar must end with an end-of-archive block and nothing after it. Otherwise
            `reader` must cover complete members only.

    Raises:
        DamagedTar: cut short, damaged, compressed or no tar at all; the message names the byte.
    """
    if whole and reader.stop == 0:
        raise DamagedTar(f"shard {shard} is an empty file; fetch or write it again")
    position = reader.position
    first, name, size = -1, None, None  # from extended headers before the current one
    sparse = False
    while True:
        if not whole and position == reader.stop and first < 0:
            return
        header = reader.take(BLOCK)
        if len(header) < BLOCK:
            if whole and position == 0:
                raise _no_tar(header, shard)
            raise _damaged(shard, position, "it ends without an end-of-archive block")
        if header == _ZEROS and whole and first < 0:
            _check_tail(reader, shard)
            return
        kind, stored_name, stored_size = _parse(header, shard, position)
        first = position if first < 0 else first
        data = position + BLOCK
        if kind in b"LKxXg":
            extended = _extended(reader, shard, position, stored_size)
            position = data + _padded(stored_size)
            if kind == b"L":
                name = extended.split(b"\0", 1)[0]
            elif kind != b"K":
                fields = _pax(extended, shard, position)
                if kind == b"g" and not fields.keys().isdisjoint((b"path", b"size")):
                    raise _damaged(shard, position, "a global header names a path or a size")
                name, size = fields.get(b"path", name), _pax_size(fields, size, shard, position)
                sparse = sparse or any(field.startswith(b"GNU.sparse") for field in fields)
            continue
        length = stored_size if size is None else size
        if kind == b"S":
            data = _after_sparse_map(reader, header, data)
        end = data + (0 if kind in _NO_DATA else _padded(length))
        if end > reader.stop:
            raise _damaged(shard, position, f"a member of {length} bytes extends past the end of the file")
        full = stored_name if name is None else name
        what = _KINDS.get(kind, f"member of type {kind!r}")
        if sparse:
            what = "sparse file"
        elif kind == b"\0" and full.endswith(b"/") and not length:  # a folder in V7 format
            what = "folder"
        length = 0 if kind in _NO_DATA else length
        yield Member(full.decode("utf-8", "surrogateescape"), what, first, data, length, end)
        reader.skip_to(end)
        position, first, name, size, sparse = end, -1, None, None, False


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _damaged(shard: str, position: int, reason: str) -> DamagedTar:
    found = f"shard {shard} is cut short or damaged at byte {position} ({reason})"
    return DamagedTar(f"{found}; fetch or write it again")


def _parse(header: bytes, shard: str, position: int) -> tuple[bytes, bytes, int]:
    """Type, name and size from a header block, after a check of its checksum."""
    summed, expected = header[:148] + b" " * 8 + header[156:], _number(header[148:156])
    if expected != sum(summed) and expected != sum(array("b", summed)):  # old writers summed signed bytes
        if position == 0:
            raise _no_tar(header, shard)
        raise _damaged(shard, position, "the checksum of a header is wrong")
    size = _number(header[124:136])
    if size is None:
        raise _damaged(shard, position, "a header has no valid size")
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:  # GNU headers use the prefix field for other things
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return header[156:157], name, size


def _number(field: bytes) -> int | None:
    """An octal number, or a binary one in GNU's format above 8 GiB; None if it is invalid."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _no_tar(header: bytes, shard: str) -> DamagedTar:
    kind = next((name for magic, name in _COMPRESSED.items() if header.startswith(magic)), None)
    if kind:
        return DamagedTar(f"shard {shard} is compressed with {kind}; decompress it to a plain tar")
    found = f"it begins with {header[:12]!r}..."
    return DamagedTar(f"shard {shard} is not a complete, uncompressed tar ({found}); fetch or write it again")


def _extended(reader: Reader, shard: str, position: int, size: int) -> bytes:
    if size > MAX_EXTENDED:
        raise _damaged(shard, position, f"a name of {size} bytes, expected at most {MAX_EXTENDED}")
    data = reader.take(_padded(size))
    if len(data) < _padded(size):
        raise _damaged(shard, position, "it ends inside a long name")
    return data[:size]


def _pax(data: bytes, shard: str, position: int) -> dict[bytes, bytes]:
    """The records of a PAX header, each `LENGTH KEY=VALUE\\n` (POSIX pax, extended header)."""
    fields: dict[bytes, bytes] = {}
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 20)
        digits = data[at:space] if space > at else b""
        length = int(digits) if digits.isdigit() else 0
        record = data[space + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if length <= len(digits) + 1 or at + length > len(data) or not equals or not record.endswith(b"\n"):
            raise _damaged(shard, position, "a PAX header can't be read")
        fields[key] = value[:-1].rstrip(b"/") if key == b"path" else value[:-1]
        at += length
    return fields


def _pax_size(fields: dict[bytes, bytes], size: int | None, shard: str, position: int) -> int | None:
    if b"size" not in fields:
        return size
    if not fields[b"size"].isdigit() or len(fields[b"size"]) > 19:
        raise _damaged(shard, position, "a PAX header has no valid size")
    return int(fields[b"size"])


def _after_sparse_map(reader: Reader, header: bytes, data: int) -> int:
    """First data byte of an old GNU sparse file: after the blocks that continue its map."""
    more = header[482]
    while more:
        block = reader.take(BLOCK)
        data += BLOCK
        more = len(block) == BLOCK and block[504]
    return data


def _check_tail(reader: Reader, shard: str) -> None:
    """Only zeros may follow the end-of-archive block; another tar there would be lost silently."""
    while reader.position < reader.stop:
        position = reader.position
        tail = reader.take(min(1 << 16, reader.stop - position))
        if tail.count(0) != len(tail):
            reason = "a zero block is followed by more data: a damaged header, or two joined tars"
            raise _damaged(shard, position - BLOCK, reason)


def walk_samples(
    reader: Reader,
    shard: str,
    take: Callable[[Member], _T | None],
    report: Callable[[Problem], object],
    *,
    whole: bool = True,
) -> Iterator[tuple[Sample, dict[str, _T]]]:
    """Walk a tar and yield its samples, each with what `take` returned for its members.

    Args:
        reader, shard, whole: as in `walk`.
        take: called for every member; it may read the member's data from `reader`. None takes
            nothing.
        report: as in `group`.

    Yields:
        The sample, and extension -> taken value.
    """
    taken: dict[int, _T] = {}

    def members() -> Iterator[Member]:
        for member in walk(reader, shard, whole=whole):
            value = take(member)
            if value is not None:
                taken[member.offset] = value
            yield member

    for sample in group(members(), report):
        yield sample, {name: taken[offset] for name, offset, _ in sample.members if offset in taken}
        for offset in [offset for offset in taken if offset < sample.end]:
            del taken[offset]


def group(members: Iterable[Member], report: Callable[[Problem], object]) -> Iterator[Sample]:
    """Group members into samples like WebDataset: the first dot splits key and extension.

    The first sample of a key and the first member of an extension are used. Everything else is
    reported, except folders.
    """
    seen: set[str] = set()
    named = ((*name, member) for member in members if (name := _split(member, report)) is not None)
    for key, parts in itertools.groupby(named, key=operator.itemgetter(0)):
        found: dict[str, Member] = {}
        for _, extension, member in parts:
            if found.setdefault(extension, member) is not member:
                reason = "a member of this name came before in the same sample"
                report(Problem("twice", member.start, member.name, reason))
        used = list(found.values())
        sample = Sample(key, used[0].start, used[-1].end, [(e, m.offset, m.size) for e, m in found.items()])
        if key in seen:
            reason = "a sample of this key came before, and not side by side"
            report(Problem("twice", sample.start, key, reason))
        else:
            seen.add(key)
            yield sample


def refuse_damaged(shard: str, problem: Problem) -> None:
    """ShardError for a sample that is damaged; pass it to `group` with the shard's name."""
    if problem.code in ("twice", "outside"):
        found = f"{problem.name!r}, which can't be used ({problem.reason})"
        raise ShardError(f"shard {shard} contains {found}; write it again with unique, plain keys")


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Write a file without time, owner or group and with mode 0644, so that its bytes repeat."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def _split(member: Member, report: Callable[[Problem], object]) -> tuple[str, str] | None:
    """Key and extension of a member.

    None for what is no part of a sample, which is reported, except folders.
    """
    name = member.name
    if member.kind == "folder":
        return None
    match = _SPLIT.fullmatch(name)
    if name.startswith("/") or ".." in name.split("/"):
        code, reason = "outside", "its name points outside"
    elif member.kind != "file":
        code, reason = "left_out", f"it is no plain file but a {member.kind}"
    elif _META.match(name) or name.rpartition("/")[2].startswith("."):
        code, reason = "left_out", "a hidden or metadata file"
    elif match is None:
        code, reason = "left_out", "its name has no extension"
    elif _CONTROL.search(name) or match.group(2).startswith("__"):
        code, reason = "name", "its name has control characters or a reserved extension"
    else:
        return match.group(1), match.group(2).lower()
    report(Problem(code, member.start, name, reason))
    return None

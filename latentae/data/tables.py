"""The index of one shard: a table of its samples, built in one pass and memory-mapped.

The file is a safetensors file. It has arrays of unsigned integers in the smallest type that fits,
and under the metadata key `latentae_index` a JSON record after its CRC-32. The same shard gives the
same bytes.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import threading
import zlib
from array import array
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from latentae.data.headers import IMAGE_EXTENSIONS, image_size
from latentae.data.sources import is_remote, read_exactly, read_range, shard_changed, shown, size_of, stream
from latentae.data.tars import BLOCK, Member, Problem, Reader, Sample, walk_samples
from latentae.errors import Interrupted, ShardError

__all__ = ["MAX_PROBLEMS", "SampleTable", "hash_key", "marks_match", "open_table", "scan"]

FORMAT_VERSION = 1
MAX_PROBLEMS = 1000  # listed per shard; more are only counted
RECORD = "latentae_index"
MAX_HEADER = 1 << 24  # bytes of JSON before the arrays

_TYPES = {"U8": np.dtype("u1"), "U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "U64": np.dtype("<u8")}
_ROWS = ("start", "blocks", "height", "width", "key_hash", "key_end", "last")  # one number per sample
_MEMBERS = ("extension", "skip", "bytes")  # one per member; those of a sample end at its "last"
_TEXT = ("keys", "problems")  # bytes; the problems are JSON, outside the record because they may be long
_NAMES = (*_ROWS, *_MEMBERS, *_TEXT)
_FACTS = {"samples", "bytes", "sha256", "headers", "marks", "place", "extensions", "problem_counts", "crc32"}
_NEAR = 1 << 13  # bytes per read where only headers are needed: a header and the beginning of an image


def hash_key(key: str) -> int:
    """The 64 bits of a key that decide whether it is held out."""
    data = key.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=b"latentae held out").digest(), "big")


class SampleTable:
    """The samples of one shard, in tar order.

    A memory-mapped table costs only pages of the file cache, which all processes share. A pickled
    one is the path of its file.

    Args:
        data: the index, as bytes or as a memory map.
        source: its file, or its bytes.

    Attributes:
        samples: number of samples.
        source: see above.
        record: facts about the shard: bytes, sha256, headers ...

    Raises:
        ValueError: not an index file of this version, or a damaged one.
    """

    def __init__(self, data: Any, source: str | bytes) -> None:
        self.source = source
        self.record, self._arrays = _parse(data)
        self.samples: int = len(self._arrays["start"])
        self._checked: set[str] = set()
        if any(len(self._arrays[name]) != self.samples for name in _ROWS):
            raise ValueError("its arrays differ in length")

    def _checked_array(self, name: str) -> np.ndarray:
        """A complete array; its CRC-32 is checked at the first use."""
        values = self._arrays[name]
        if name not in self._checked:
            if zlib.crc32(values.data) != self.record["crc32"][name]:
                where = self.source if isinstance(self.source, str) else "in memory"
                found = f"the index {where} is damaged ({name})"
                raise ShardError(f"{found}; remove it and run `latentae index` again")
            self._checked.add(name)
        return values

    def __reduce__(self) -> tuple[Any, ...]:
        return open_table, (self.source,)

    @property
    def data(self) -> bytes:
        """The index file."""
        return self.source if isinstance(self.source, bytes) else Path(self.source).read_bytes()

    @property
    def problems(self) -> list[Problem]:
        """What is damaged or left out; at most MAX_PROBLEMS, while the record counts all."""
        return [Problem(*problem) for problem in json.loads(self._checked_array("problems").tobytes())]

    @property
    def height(self) -> np.ndarray:
        """int32 [n]: height of the upright image in pixels, by its header; 0 is unknown."""
        return self._checked_array("height").astype(np.int32)

    @property
    def width(self) -> np.ndarray:
        """int32 [n]: width of the upright image in pixels, by its header; 0 is unknown."""
        return self._checked_array("width").astype(np.int32)

    @property
    def key_hash(self) -> np.ndarray:
        """uint64 [n]: `hash_key` of each key."""
        return self._checked_array("key_hash").astype(np.uint64, copy=False)

    def span(self, row: int) -> tuple[int, int]:
        """First byte of a sample in the tar, and the first byte after it."""
        start = int(self._arrays["start"][row]) * BLOCK
        return start, start + int(self._arrays["blocks"][row]) * BLOCK

    def key(self, row: int) -> str:
        """The key of a sample."""
        text = self._arrays["keys"][self._range("key_end", row)]
        return text.tobytes().decode("utf-8", "surrogateescape")

    def keys(self) -> list[str]:
        """The keys of all samples."""
        text, ends = self._checked_array("keys").tobytes(), self._checked_array("key_end").tolist()
        return [text[a:b].decode("utf-8", "surrogateescape") for a, b in zip([0, *ends], ends, strict=False)]

    def members(self, row: int) -> tuple[tuple[str, int, int], ...]:
        """Extension (lower case, no dot), first byte in the tar, and bytes of each member."""
        inside, start = self._range("last", row), int(self._arrays["start"][row])
        columns = zip(*(self._arrays[name][inside].tolist() for name in _MEMBERS), strict=True)
        names: list[str] = self.record["extensions"]
        return tuple((names[extension], (start + skip) * BLOCK, size) for extension, skip, size in columns)

    def _range(self, ends: str, row: int) -> slice:
        values = self._arrays[ends]
        return slice(int(values[row - 1]) if row else 0, int(values[row]))


def open_table(source: str | bytes) -> SampleTable:
    """The table in an index file (memory-mapped) or in its bytes.

    Raises:
        OSError: the file can't be opened.
        ValueError: not an index file of this version, or a damaged one.
    """
    if isinstance(source, bytes):
        return SampleTable(source, source)
    with Path(source).open("rb") as file:
        if os.fstat(file.fileno()).st_size < 8:
            raise ValueError("it is cut short")
        return SampleTable(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), source)


def _parse(data: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The record and the arrays of an index file."""
    try:
        (length,) = struct.unpack_from("<Q", data, 0)
        base = 8 + length
        if length > MAX_HEADER or base > len(data):
            raise ValueError("it is cut short")
        entries = json.loads(bytes(data[8:base]))
        text = entries["__metadata__"][RECORD]
        if f"{zlib.crc32(text[8:].encode()):08x}" != text[:8]:
            raise ValueError("its record is damaged")
        record: dict[str, Any] = json.loads(text[8:])
        if record["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format is {record['format_version']}, expected {FORMAT_VERSION}")
        if not record.keys() >= _FACTS:
            raise ValueError("its record is not complete")
        return record, {name: _array(data, name, entries[name], base) for name in _NAMES}
    except (struct.error, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"it is no index file ({type(error).__name__}: {error})") from None


def _array(data: Any, name: str, entry: dict[str, Any], base: int) -> np.ndarray:
    dtype, (begin, end) = _TYPES[entry["dtype"]], entry["data_offsets"]
    if not 0 <= begin <= end <= len(data) - base or (end - begin) % dtype.itemsize:
        raise ValueError(f"array {name} is outside the file")
    return np.frombuffer(data, dtype, (end - begin) // dtype.itemsize, base + begin)


def scan(
    path: str,
    *,
    hashed: bool,
    place: str = "",
    stop: threading.Event | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> SampleTable:
    """Index one shard: walk its headers, read image sizes, and hash it in the same pass.

    Args:
        path: local or remote.
        hashed: read and hash every byte; otherwise only headers of a local shard are read. Remote
            shards are always hashed.
        place: location of the shard, for the record; empty if the index is in the same folder.
        stop: when set, the scan ends with Interrupted.
        advance: called with numbers of bytes passed.

    Returns:
        The new index in memory.

    Raises:
        ShardError: the shard is missing, cut short, damaged or no tar.
    """
    size = size_of(path)
    builder = _Builder(path, stop, advance)
    digest = hashlib.sha256() if hashed or is_remote(path) else None
    if digest is None:
        end = builder.collect(Reader(partial(read_range, path), size, chunk=_NEAR))
    else:
        with stream(path) as file:
            end = builder.collect(Reader(partial(read_exactly, path, file), size, observe=digest.update))
    if size_of(path) != size:
        raise shard_changed(path)
    sha256 = digest.hexdigest() if digest else ""
    marks = [] if is_remote(path) else [[at, _block_hash(path, at)] for at in builder.marked(end)]
    data = builder.to_bytes(bytes=size, sha256=sha256, marks=marks, place=place)
    return SampleTable(data, data)


def marks_match(path: str, marks: list[list[Any]]) -> bool:
    """Whether a local shard still has its indexed first, last and end-of-archive headers."""
    return is_remote(path) or all(_block_hash(path, int(start)) == digest for start, digest in marks)


def _block_hash(path: str, start: int) -> str:
    return hashlib.blake2b(read_range(path, start, start + BLOCK), digest_size=8).hexdigest()


class _Builder:
    """Collects the samples of a shard for its index."""

    def __init__(self, path: str, stop: threading.Event | None, advance: Callable[[int], object]) -> None:
        self._path, self._stop, self._advance, self._passed = path, stop, advance, 0
        self._columns = {name: array("B" if name in _TEXT else "Q") for name in _NAMES}
        self._extensions: dict[str, int] = {}
        self._problems: list[Problem] = []
        self._counts: Counter[str] = Counter()

    def collect(self, reader: Reader) -> int:
        """Add all samples of a shard; returns the first byte of its end-of-archive block."""
        end = 0

        def measure(member: Member) -> tuple[int, int] | None:
            nonlocal end
            self._pace(reader.position)
            end = member.end
            if member.kind != "file" or member.name.rpartition(".")[2].lower() not in IMAGE_EXTENSIONS:
                return None
            return image_size(reader.take, member.size, lambda count: reader.skip_to(reader.position + count))

        bare: list[Sample] | None = []  # samples without an image, until the first one with an image
        for sample, sizes in walk_samples(reader, shown(self._path), measure, self._report):
            there = {extension for extension, _, _ in sample.members}
            image = next((extension for extension in IMAGE_EXTENSIONS if extension in there), None)
            if image is None and bare is not None:
                bare.append(sample)
            elif image is None:
                self._report_bare(sample)
            else:
                for other in bare or ():
                    self._report_bare(other)
                bare = None
                if image not in sizes:
                    reason = "the header of its image can't be read"
                    self._report(Problem("image", sample.start, sample.key, reason))
                self._add(sample, sizes.get(image, (0, 0)))
        for sample in bare or ():  # a shard without images, such as one of latents
            self._add(sample, (0, 0))
        self._pace(reader.position)
        return end

    def _pace(self, position: int) -> None:
        if self._stop is not None and self._stop.is_set():
            raise Interrupted("indexing was stopped; run the same command again to resume")
        self._advance(position - self._passed)
        self._passed = position

    def _report(self, problem: Problem) -> None:
        self._counts[problem.code] += 1
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(problem)

    def _report_bare(self, sample: Sample) -> None:
        there = ", ".join(extension for extension, _, _ in sample.members)
        reason = f"a sample without an image (it has {there})"
        self._report(Problem("left_out", sample.start, sample.key, reason))

    def _add(self, sample: Sample, size: tuple[int, int]) -> None:
        c = self._columns
        start = sample.start // BLOCK
        c["start"].append(start)
        c["blocks"].append(sample.end // BLOCK - start)
        c["height"].append(size[0])
        c["width"].append(size[1])
        c["key_hash"].append(hash_key(sample.key))
        c["keys"].frombytes(sample.key.encode("utf-8", "surrogateescape"))
        c["key_end"].append(len(c["keys"]))
        for extension, offset, count in sample.members:
            c["extension"].append(self._extensions.setdefault(extension, len(self._extensions)))
            c["skip"].append(offset // BLOCK - start)
            c["bytes"].append(count)
        c["last"].append(len(c["extension"]))

    def marked(self, end: int) -> list[int]:
        """Offsets of the headers that `marks_match` checks: first, last and `end`."""
        starts = self._columns["start"]
        return sorted({*(start * BLOCK for start in (*starts[:1], *starts[-1:])), end})

    def _headers(self) -> str:
        """Hex digest of keys, members and their offsets.

        Tars that differ only inside their members share it.
        """
        digest = hashlib.blake2b(json.dumps(list(self._extensions)).encode(), digest_size=16)
        for name in ("start", "blocks", "key_end", "keys", "last", "extension", "skip", "bytes"):
            column = self._values(name)
            digest.update(len(column).to_bytes(8, "little"))
            digest.update(column.astype(column.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    def _values(self, name: str) -> np.ndarray:
        return np.frombuffer(self._columns[name], np.uint8 if name in _TEXT else np.uint64)

    def _smallest(self, name: str) -> np.ndarray:
        values = self._values(name)
        top = int(values.max()) if len(values) else 0
        return values.astype(next(dtype for dtype in _TYPES.values() if top <= np.iinfo(dtype).max))

    def to_bytes(self, **facts: Any) -> bytes:
        """The index file; `facts` (plain JSON values) join its record."""
        from safetensors.numpy import save

        self._columns["problems"] = array("B", json.dumps(self._problems).encode())
        arrays = {name: self._smallest(name) for name in _NAMES}
        record = {
            "format_version": FORMAT_VERSION,
            "samples": len(arrays["start"]),
            "headers": self._headers(),
            "extensions": list(self._extensions),
            "problem_counts": dict(sorted(self._counts.items())),
            "crc32": {name: zlib.crc32(values.data) for name, values in arrays.items()},
            **facts,
        }
        text = json.dumps(record)
        return save(arrays, {RECORD: f"{zlib.crc32(text.encode()):08x}{text}"})

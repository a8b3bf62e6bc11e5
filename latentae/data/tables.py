"""The index of one shard: which samples lie where in the tar, in one compact file that is read by memory mapping.

A safetensors file: arrays of unsigned integers in the smallest type that fits, and a JSON record under the metadata key
`latentae_index`, after its CRC-32. The same shard gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import zlib
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from latentae.data.tars import BLOCK, Problem, Sample
from latentae.errors import ShardError

__all__ = [
    "FORMAT_VERSION",
    "MAX_PROBLEMS",
    "SampleTable",
    "TableBuilder",
    "hash_key",
    "open_table",
    "read_record",
]

FORMAT_VERSION = 1
MAX_PROBLEMS = 1000  # listed one by one for each shard; the others are counted
RECORD = "latentae_index"
MAX_HEADER = 1 << 24  # bytes of JSON before the arrays

_TYPES = {"U8": np.dtype("u1"), "U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "U64": np.dtype("<u8")}
_ROWS = ("start", "blocks", "height", "width", "key_hash", "key_end", "last")  # one number for each sample
_MEMBERS = ("extension", "skip", "bytes")  # one for each member; those of a sample end at its "last"
_TEXT = (
    "keys",
    "problems",
)  # bytes; the problems are JSON, apart from the record for they may be long and are seldom read
_NAMES = (*_ROWS, *_MEMBERS, *_TEXT)
_FACTS = {"samples", "bytes", "sha256", "headers", "marks", "place", "extensions", "problem_counts", "crc32"}


def hash_key(key: str) -> int:
    """The 64 bits of a key that decide whether it is held out."""
    digest = hashlib.blake2b(
        key.encode("utf-8", "surrogateescape"), digest_size=8, key=b"latentae held out"
    ).digest()
    return int.from_bytes(digest, "big")


class SampleTable:
    """The samples of one shard, in tar order.

    It reads from a memory-mapped file where it has one, so a copy costs pages of the file cache, shared by all processes; pickled,
    it travels as the path of that file.

    Attributes:
        samples: how many.
        record: what the index says of the shard: bytes, sha256, headers ...
    """

    def __init__(self, data: Any, source: str | bytes) -> None:
        self._source, header = source, _header(data)
        self.record: dict[str, Any] = header.record
        if not self.record.keys() >= _FACTS:
            raise ValueError("its record is not complete")
        self._arrays = {name: np.frombuffer(data, *header.arrays[name]) for name in _NAMES}
        self._checked: set[str] = set()
        self.samples: int = len(self._arrays["start"])
        self._extensions: list[str] = self.record["extensions"]
        if not all(len(self._arrays[name]) == self.samples for name in _ROWS):
            raise ValueError("its arrays differ in length")

    def __len__(self) -> int:
        return self.samples

    def _whole(self, name: str) -> np.ndarray:
        """An array of which every number is wanted: checked when it is first asked for."""
        values = self._arrays[name]
        if name not in self._checked:
            if zlib.crc32(values.data) != self.record["crc32"][name]:
                place = self._source if isinstance(self._source, str) else "in memory"
                raise ShardError(
                    f"the index {place} is damaged ({name}); remove it and run `latentae index` again"
                )
            self._checked.add(name)
        return values

    def __reduce__(self) -> tuple[Any, ...]:
        return open_table, (self._source,)

    @property
    def problems(self) -> list[Problem]:
        """What is damaged or left out of the index; at most MAX_PROBLEMS, though the record counts all."""
        return [Problem(*problem) for problem in json.loads(self._whole("problems").tobytes())]

    @property
    def offset(self) -> np.ndarray:
        """int64 [n]: first byte of each sample's first header in the tar."""
        return self._whole("start").astype(np.int64) * BLOCK

    @property
    def size(self) -> np.ndarray:
        """int64 [n]: bytes from there to the end of the padding of the sample's last member."""
        return self._whole("blocks").astype(np.int64) * BLOCK

    @property
    def height(self) -> np.ndarray:
        """int32 [n]: height of the image in pixels, upright, by its header; 0 unknown."""
        return self._whole("height").astype(np.int32)

    @property
    def width(self) -> np.ndarray:
        """int32 [n]: width of the image in pixels, upright, by its header; 0 unknown."""
        return self._whole("width").astype(np.int32)

    @property
    def key_hash(self) -> np.ndarray:
        """uint64 [n]: the hash of each key that decides whether the sample is held out."""
        return self._whole("key_hash").astype(np.uint64, copy=False)

    def span(self, row: int) -> tuple[int, int]:
        """First byte of a sample in the tar, and the first byte after it."""
        start = int(self._arrays["start"][row]) * BLOCK
        return start, start + int(self._arrays["blocks"][row]) * BLOCK

    def key(self, row: int) -> str:
        """The key of a sample."""
        ends = self._arrays["key_end"]
        text = self._arrays["keys"][int(ends[row - 1]) if row else 0 : int(ends[row])]
        return text.tobytes().decode("utf-8", "surrogateescape")

    def keys(self) -> list[str]:
        """The keys of all samples."""
        text, ends = self._whole("keys").tobytes(), self._whole("key_end").tolist()
        return [text[a:b].decode("utf-8", "surrogateescape") for a, b in zip([0, *ends], ends, strict=False)]

    def members(self, row: int) -> tuple[tuple[str, int, int], ...]:
        """Extension (lower case, no dot), first byte of the data in the tar, bytes of data, of each member of a sample."""
        ends = self._arrays["last"]
        found, start = [], int(self._arrays["start"][row]) * BLOCK
        for i in range(int(ends[row - 1]) if row else 0, int(ends[row])):
            extension = self._extensions[int(self._arrays["extension"][i])]
            found.append(
                (extension, start + int(self._arrays["skip"][i]) * BLOCK, int(self._arrays["bytes"][i]))
            )
        return tuple(found)


class TableBuilder:
    """Collects the samples of a shard for its index."""

    def __init__(self) -> None:
        self._columns = {name: array("B" if name in _TEXT else "Q") for name in _NAMES}
        self._extensions: dict[str, int] = {}
        self.problems: list[Problem] = []
        self.counts: Counter[str] = Counter()

    @property
    def samples(self) -> int:
        """How many so far."""
        return len(self._columns["start"])

    def report(self, problem: Problem) -> None:
        """Count what is not used, and list it up to a limit."""
        self.counts[problem.code] += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def add(self, sample: Sample, image: tuple[int, int] | None) -> None:
        """One more sample, and height and width of its image."""
        c = self._columns
        start = sample.start // BLOCK
        c["start"].append(start)
        c["blocks"].append(sample.end // BLOCK - start)
        c["height"].append(image[0] if image else 0)
        c["width"].append(image[1] if image else 0)
        c["key_hash"].append(hash_key(sample.key))
        c["keys"].frombytes(sample.key.encode("utf-8", "surrogateescape"))
        c["key_end"].append(len(c["keys"]))
        for extension, offset, size in sample.members:
            c["extension"].append(self._extensions.setdefault(extension, len(self._extensions)))
            c["skip"].append(offset // BLOCK - start)
            c["bytes"].append(size)
        c["last"].append(len(c["extension"]))

    def ends(self) -> list[int]:
        """First bytes of the first and the last sample, if there are any."""
        starts = self._columns["start"]
        return [starts[0] * BLOCK, starts[-1] * BLOCK] if starts else []

    def headers(self) -> str:
        """Hex digest of keys, members and where they lie: another tar has another one, but for the bytes inside its members."""
        digest = hashlib.blake2b(json.dumps(list(self._extensions)).encode(), digest_size=16)
        for name in ("start", "blocks", "key_end", "keys", "last", "extension", "skip", "bytes"):
            column = _values(name, self._columns[name])
            digest.update(len(column).to_bytes(8, "little"))
            digest.update(column.astype(column.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    def to_bytes(self, **facts: Any) -> bytes:
        """The index file; `facts` (plain JSON values) join its record."""
        from safetensors.numpy import save

        self._columns["problems"] = array(
            "B", json.dumps([list(problem) for problem in self.problems]).encode()
        )
        arrays = {name: _smallest(name, column) for name, column in self._columns.items()}
        record = {
            "format_version": FORMAT_VERSION,
            "samples": self.samples,
            "headers": self.headers(),
            "extensions": list(self._extensions),
            "problem_counts": dict(sorted(self.counts.items())),
            "crc32": {name: zlib.crc32(array.data) for name, array in arrays.items()},
            **facts,
        }
        text = json.dumps(record)
        return save(arrays, {RECORD: f"{zlib.crc32(text.encode()):08x}{text}"})


def _values(name: str, column: array) -> np.ndarray:
    return np.frombuffer(column, np.uint8 if name in _TEXT else np.uint64)


def _smallest(name: str, column: array) -> np.ndarray:
    values = _values(name, column)
    top = int(values.max()) if len(values) else 0
    return values.astype(next(kind for kind in _TYPES.values() if top <= np.iinfo(kind).max))


class _Header:
    """What stands before the arrays of an index file."""

    def __init__(self, entries: dict[str, Any], base: int, total: int) -> None:
        text = entries["__metadata__"][RECORD]
        if f"{zlib.crc32(text[8:].encode()):08x}" != text[:8]:
            raise ValueError("its record is damaged")
        self.record = json.loads(text[8:])
        if self.record["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format is {self.record['format_version']}, expected {FORMAT_VERSION}")
        self.arrays: dict[
            str, tuple[np.dtype, int, int]
        ] = {}  # type, count, first byte, as np.frombuffer takes them
        for name in _NAMES:
            kind, (begin, end) = _TYPES[entries[name]["dtype"]], entries[name]["data_offsets"]
            if not 0 <= begin <= end <= total - base or (end - begin) % kind.itemsize:
                raise ValueError(f"array {name} lies outside the file")
            self.arrays[name] = (kind, (end - begin) // kind.itemsize, base + begin)


def _header(data: Any) -> _Header:
    try:
        (length,) = struct.unpack_from("<Q", data, 0)
        if length > MAX_HEADER or 8 + length > len(data):
            raise ValueError("it is cut short")
        return _Header(json.loads(bytes(data[8 : 8 + length])), 8 + length, len(data))
    except (struct.error, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"it is no index file ({type(error).__name__}: {error})") from None


def open_table(source: str | bytes) -> SampleTable:
    """The table in an index file (memory-mapped) or in its bytes.

    Raises:
        OSError: the file can't be opened.
        ValueError: it is no index file of this version, or damaged.
    """
    if isinstance(source, bytes):
        return SampleTable(source, source)
    with Path(source).open("rb") as file:
        if os.fstat(file.fileno()).st_size < 8:
            raise ValueError("it is cut short")
        return SampleTable(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), source)


def read_record(source: str | bytes) -> dict[str, Any]:
    """What an index says of its shard, without its arrays; errors as `open_table`."""
    return open_table(source).record

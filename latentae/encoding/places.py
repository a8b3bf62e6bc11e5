"""Where the samples of a latent shard lie: one walk over its headers, kept as arrays of a few dozen bytes a sample."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from latentae.data.sources import is_remote, read_range, shown, size_of
from latentae.data.tars import Member, Problem, Reader, Sample, group, walk
from latentae.encoding.sidecar import Sidecar
from latentae.errors import DataError, ShardError

__all__ = [
    "BAD_LABEL",
    "CLASS_NUMBERS",
    "JSON_MEMBER",
    "LATENT_MEMBER",
    "PackedLayout",
    "Places",
    "has_label",
    "join",
    "label_of",
    "scan_places",
]

LATENT_MEMBER, JSON_MEMBER = "latent.safetensors", "latent.json"
_READ = (".json", ".cls")  # members that are read along with the headers
CLASS_NUMBERS = 'but classes are whole numbers from 0; write them into `cls`, or into `json` as "label"'
BAD_LABEL = -2  # a label that is no class number; -1 is none
_LARGEST = 1 << 20  # bytes of such a member; a label lies in a small one
_NEAR, _FAR = 1 << 13, 1 << 22  # bytes read at once from a disk and from a server
_MAX_HEADER = 1 << 24  # bytes of JSON before the tensors of a packed file


class PackedLayout(NamedTuple):
    """A file of stacked latents."""

    path: str
    shape: tuple[int, int, int]
    """Of one latent, [z, h, w]."""
    dtype: str
    """As safetensors names it: BF16, F16 or F32."""
    begins: dict[str, int]
    """First byte of each stack, by name."""
    rows: int


@dataclass(frozen=True)
class Places:
    """The samples of a shard, or of many, one number a sample."""

    start: np.ndarray
    """int64: first byte in the tar."""
    span: np.ndarray
    """uint32: bytes in the tar."""
    where: np.ndarray
    """uint32: the latent's first byte after `start`, or its row in a packed file."""
    size: np.ndarray
    """uint32: bytes of the latent's member; 0 in a packed file."""
    file: np.ndarray
    """int32: number of the packed file, -1 where the latent is in the tar."""
    height: np.ndarray
    """uint16: of the encoded image in pixels."""
    width: np.ndarray
    """uint16."""
    label: np.ndarray
    """int64: class label, -1 where the sample has none, BAD_LABEL where it is no class number."""
    key_end: np.ndarray
    """int64: where the sample's key ends in `keys`."""
    keys: np.ndarray
    """uint8: the keys, UTF-8, end to end."""

    def __len__(self) -> int:
        return len(self.start)

    def key(self, index: int) -> str:
        """The key of a sample."""
        begin = int(self.key_end[index - 1]) if index else 0
        return self.keys[begin : int(self.key_end[index])].tobytes().decode("utf-8", "surrogateescape")


_TYPES = {
    "start": np.int64,
    "span": np.uint32,
    "where": np.uint32,
    "size": np.uint32,
    "file": np.int32,
    "height": np.uint16,
    "width": np.uint16,
    "label": np.int64,
    "key_end": np.int64,
}


def join(parts: Sequence[Places], files: Sequence[int]) -> Places:
    """The samples of several shards in one; `files` is how many packed files each has."""
    arrays = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Places)}
    before_text = np.cumsum([0, *(len(part.keys) for part in parts)])
    before_file = np.cumsum([0, *files])
    for number in range(len(parts)):
        arrays["key_end"][number] = arrays["key_end"][number] + before_text[number]
        own = arrays["file"][number]
        arrays["file"][number] = np.where(own < 0, own, own + before_file[number]).astype(np.int32)
    empty = {**_TYPES, "keys": np.uint8}
    return Places(
        **{name: np.concatenate([np.zeros(0, empty[name]), *values]) for name, values in arrays.items()}
    )


def scan_places(path_of: Callable[[str], str], sidecar: Sidecar) -> tuple[Places, list[PackedLayout]]:
    """Walk the headers of one shard.

    Args:
        path_of: name in the output folder -> path or URL.
        sidecar: of the shard.

    Raises:
        ShardError: the shard or one of its packed files is damaged or does not fit its sidecar.
    """
    path = path_of(sidecar.shard)
    layouts = [_layout(path_of(file.name), file.rows) for file in sidecar.packed]
    reader = Reader(
        lambda start, stop: read_range(path, start, stop),
        size_of(path),
        chunk=_FAR if is_remote(path) else _NEAR,
    )
    small: dict[int, bytes] = {}

    def members() -> Iterator[Member]:
        for member in walk(reader, shown(path)):
            if member.kind == "file" and member.name.lower().endswith(_READ) and member.size <= _LARGEST:
                small[member.offset] = reader.take(member.size)
            yield member

    rows: list[tuple[int, ...]] = []
    text = bytearray()
    for sample in group(members(), lambda problem: _refuse(path, problem)):
        text += sample.key.encode("utf-8", "surrogateescape")
        rows.append((*_place(path, sample, small, layouts), len(text)))
        for offset in [offset for offset in small if offset < sample.end]:
            del small[offset]
    if len(rows) != sidecar.output.samples:
        raise ShardError(
            f"{shown(path)} holds {len(rows)} samples, not {sidecar.output.samples}; delete it and encode again"
        )
    columns = list(zip(*rows, strict=True)) or [()] * len(_TYPES)
    arrays = {
        name: np.array(column, kind) for (name, kind), column in zip(_TYPES.items(), columns, strict=True)
    }
    for number, layout in enumerate(layouts):
        if not np.array_equal(np.sort(arrays["where"][arrays["file"] == number]), np.arange(layout.rows)):
            raise ShardError(
                f"{shown(path)} and {shown(layout.path)} hold different samples; delete both and encode again"
            )
    return Places(**arrays, keys=np.frombuffer(bytes(text), np.uint8)), layouts


def _place(
    path: str, sample: Sample, small: dict[int, bytes], layouts: Sequence[PackedLayout]
) -> tuple[int, ...]:
    """The numbers of one sample, in the order of _TYPES, but for the last."""
    there = {extension: (offset, size) for extension, offset, size in sample.members}
    texts = {extension: small.get(offset, b"") for extension, (offset, _) in there.items()}
    try:
        info = json.loads(texts[JSON_MEMBER])
        height, width = (
            info["bucket"] if "bucket" in info else info["crop"][2:]
        )  # the first format had squares only
        if LATENT_MEMBER in there:
            offset, size = there[LATENT_MEMBER]
            where, file = offset - sample.start, -1
        else:
            where, size = info["row"], 0
            end = f".latents-{height}x{width}.safetensors"
            file = next(number for number, layout in enumerate(layouts) if layout.path.endswith(end))
    except (KeyError, ValueError, TypeError, StopIteration) as error:
        raise ShardError(
            f"sample {sample.key!r} of {shown(path)} holds no latent; delete the shard and encode again"
        ) from error
    try:
        label = label_of(texts.get("cls"), texts.get("json"))
    except ValueError:
        label = BAD_LABEL
    span = sample.end - sample.start
    return sample.start, span, where, size, file, height, width, -1 if label is None else label


def label_of(cls: bytes | None, text: bytes | None) -> int | None:
    """The class label of a sample: its `cls`, or the "label" of its `json`. A whole number may be written as 3, "3", 3.0 or true.

    Returns:
        From 0; None where there is neither, or it is empty, null or -1.

    Raises:
        ValueError: there is a label, but no class number; says what was found.
    """
    try:
        record = json.loads(text) if cls is None and text is not None else None
    except (ValueError, RecursionError):
        raise ValueError("a json that can't be read") from None
    value = (
        cls.decode("utf-8", "replace").strip()
        if cls is not None
        else record.get("label")
        if isinstance(record, dict)
        else None
    )
    if value in (None, ""):
        return None
    number = _whole(value)
    if number is None or not -1 <= number < 1 << 63:
        raise ValueError(f"the label {value!r}")
    return None if number == -1 else number


def _whole(value: object) -> int | None:
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)
    if isinstance(value, int | float | str):
        with suppress(ValueError):
            return int(number) if (number := float(value)).is_integer() else None
    return None


def _layout(path: str, rows: int) -> PackedLayout:
    """The header of a packed file (the safetensors format: u64 length, JSON, tensors)."""
    try:
        (length,) = struct.unpack("<Q", read_range(path, 0, 8))
        if length > _MAX_HEADER:
            raise ValueError("its header is too long")
        header: dict[str, Any] = json.loads(read_range(path, 8, 8 + length))
        header.pop("__metadata__", None)
        shape = header["mean"]["shape"]
        if shape[0] != rows or len(shape) != 4 or any(entry["shape"] != shape for entry in header.values()):
            raise ValueError(f"its mean is {shape}, expected {rows} latents")
        begins = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
        return PackedLayout(path, (shape[1], shape[2], shape[3]), header["mean"]["dtype"], begins, rows)
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{shown(path)} is damaged ({error}); delete it and run the same encode command again"
        ) from error


def _refuse(path: str, problem: Problem) -> None:
    if problem.code != "left_out":
        raise ShardError(
            f"{shown(path)} holds {problem.name!r} ({problem.reason}); delete it and run the same encode command again"
        )


def has_label(shards: Iterable[str]) -> bool:
    """Whether the first sample of some shards of images has a class label; True where there is no sample.

    Raises:
        ShardError: a shard can't be read.
        DataError: the label is no class number.
    """
    for path in shards:
        reader = Reader(
            lambda start, stop, path=path: read_range(path, start, stop), size_of(path), chunk=_NEAR
        )
        for sample in group(walk(reader, shown(path)), lambda problem: None):
            there = {
                extension: (offset, size) for extension, offset, size in sample.members if size <= _LARGEST
            }
            texts = {
                kind: read_range(path, there[kind][0], sum(there[kind]))
                for kind in ("cls", "json")
                if kind in there
            }
            try:
                return label_of(texts.get("cls"), texts.get("json")) is not None
            except ValueError as error:
                raise DataError(
                    f"sample {sample.key!r} of {shown(path)} has {error}, {CLASS_NUMBERS}"
                ) from None
    return True

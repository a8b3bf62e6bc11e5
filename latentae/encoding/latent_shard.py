"""Latent shards on disk: members of a sample, class labels, a reader and an index of samples.

A sample `KEY.jpg, KEY.txt` of an image shard becomes

    KEY.latent.safetensors   mean, logvar[, mean_flip, logvar_flip] [z, h, w], raw, stored type
    KEY.latent.json          original size and the crop that the latent shows
    KEY.txt                  unchanged, as every member except the image, which `keep_images` keeps;
                             extensions become lower case, as WebDataset reads them

A packed shard has no KEY.latent.safetensors. NAME.latents-HxW.safetensors next to the tar stacks
the latents of all images of H x W pixels, and KEY.latent.json has the `row`.
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from torch import Tensor

from latentae.data.sources import copy_to, is_remote, read_range, shown, size_of
from latentae.data.tars import Member, Problem, Reader, Sample, group, walk, walk_samples
from latentae.encoding.sidecar import Sidecar, packed_name
from latentae.encoding.store import LocalStore, Store
from latentae.errors import DataError, ShardError

__all__ = [
    "BAD_LABEL",
    "CLASS_NUMBERS",
    "JSON_MEMBER",
    "LATENT_MEMBER",
    "MISSING_LABELS",
    "LatentShard",
    "SampleIndex",
    "bucket_of",
    "has_label",
    "join",
    "label_of",
    "scan_shard",
]

LATENT_MEMBER, JSON_MEMBER = "latent.safetensors", "latent.json"
BAD_LABEL = -2  # a label that is no class number
CLASS_NUMBERS = 'but classes are whole numbers from 0; write them into `cls`, or into `json` as "label"'
MISSING_LABELS = 'give each a `cls` member, or a `json` with a whole number as "label"'
MAX_LABEL_BYTES = 1 << 20  # larger members are not searched for a label
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # by safetensors' names
_MAX_HEADER = 1 << 24  # bytes of JSON before the tensors of a packed file
_ROW = np.dtype(
    [
        ("start", np.int64),  # of the sample in the tar, in bytes
        ("label", np.int64),  # class label, -1 without one, or BAD_LABEL
        ("key_end", np.int64),  # end of the key in `keys`
        ("span", np.uint32),  # bytes in the tar
        ("latent", np.uint32),  # offset of the latent after `start`, or its row in a packed file
        ("size", np.uint32),  # bytes of the latent's member, 0 in a packed file
        ("file", np.int32),  # number of the packed file, -1 if the latent is in the tar
        ("height", np.uint16),  # of the encoded image in pixels
        ("width", np.uint16),
    ],
    align=True,
)


def bucket_of(info: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of the encoded image, from `latent.json`."""
    height, width = info["bucket"] if "bucket" in info else info["crop"][2:]  # version 1 had squares only
    return height, width


class LatentShard:
    """`with LatentShard(store, sidecar) as shard:` reads a shard, after copying a remote one.

    Args:
        store: the output.
        sidecar: of the shard.

    Attributes:
        files: local path of the tar and its packed files, by name.

    Raises:
        ShardError: here or while reading, if the shard is damaged.
    """

    def __init__(self, store: Store, sidecar: Sidecar) -> None:
        self.store, self.sidecar, self.shown = store, sidecar, store.show(sidecar.shard)
        self.files: dict[str, Path] = {}
        self._open, self._stack = {}, ExitStack()

    def __enter__(self) -> LatentShard:
        if isinstance(self.store, LocalStore):
            self.files = {name: self.store.path(name) for name in self.sidecar.files}
            return self
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="latentae-"))
            self.files = {name: Path(folder) / str(number) for number, name in enumerate(self.sidecar.files)}
            for name, copy in self.files.items():
                copy_to(self.store.address(name), copy)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def samples(self) -> Iterator[Sample]:
        """Key and members of each sample; ShardError for a damaged tar or a member of no sample."""
        path = self.files[self.sidecar.shard]
        reader = Reader(partial(read_range, str(path)), path.stat().st_size, chunk=1 << 13)
        problems: list[Problem] = []
        for sample in group(walk(reader, self.shown), problems.append):
            self._refuse(problems)
            yield sample
        self._refuse(problems)

    def _refuse(self, problems: list[Problem]) -> None:
        if problems:
            raise ShardError(
                f"{self.shown} holds {problems[0].name!r}, which does not belong there ({problems[0].reason})"
            )

    def read(self, sample: Sample, extension: str) -> bytes:
        """The bytes of a member; ShardError if the sample has none with this extension."""
        for name, offset, size in sample.members:
            if name == extension:
                return read_range(str(self.files[self.sidecar.shard]), offset, offset + size)
        raise ShardError(f"sample {sample.key!r} in {self.shown} has no {extension}")

    def info(self, sample: Sample) -> dict[str, Any]:
        """The content of `latent.json`."""
        try:
            return dict(json.loads(self.read(sample, JSON_MEMBER)))
        except (ValueError, TypeError) as error:
            raise ShardError(
                f"the {JSON_MEMBER} of sample {sample.key!r} in {self.shown} can't be read ({error})"
            ) from error

    def tensors(self, sample: Sample, info: Mapping[str, Any]) -> dict[str, Tensor]:
        """`mean`, `logvar` and, if stored, `mean_flip`, `logvar_flip`: raw, [z, h, w]."""
        try:
            if not self.sidecar.packed:
                return load_safetensors(self.read(sample, LATENT_MEMBER))
            name = packed_name(self.sidecar.shard, *bucket_of(info))
            if name not in self._open:
                self._open[name] = self._stack.enter_context(safe_open(self.files[name], framework="pt"))
            file = self._open[name]
            return {name: file.get_slice(name)[int(info["row"])] for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
            raise ShardError(
                f"the latent of sample {sample.key!r} in {self.shown} can't be read ({error!r})"
            ) from error


class PackedLayout(NamedTuple):
    """Layout of a file of stacked latents."""

    path: str
    shape: tuple[int, int, int]
    """Of one latent, [z, h, w]."""
    dtype: str
    """Name in safetensors: BF16, F16 or F32."""
    begins: dict[str, int]
    """First byte of each stack, by name."""
    rows: int

    def read(self, name: str, row: int) -> Tensor:
        """One row of a stack, [z, h, w] fp32."""
        dtype = _DTYPES[self.dtype]
        length = math.prod(self.shape) * dtype.itemsize
        begin = self.begins[name] + row * length
        data = bytearray(read_range(self.path, begin, begin + length))
        return torch.frombuffer(data, dtype=dtype).reshape(self.shape).float()


class SampleIndex(NamedTuple):
    """The samples of one or more shards."""

    rows: np.ndarray
    """[n] of `_ROW`."""
    keys: np.ndarray
    """uint8: the keys in UTF-8, concatenated."""
    files: list[PackedLayout]

    def key(self, index: int) -> str:
        """The key of a sample."""
        ends = self.rows["key_end"]
        begin = int(ends[index - 1]) if index else 0
        return self.keys[begin : int(ends[index])].tobytes().decode("utf-8", "surrogateescape")


def join(parts: Sequence[SampleIndex]) -> SampleIndex:
    """Concatenate the indexes of shards."""
    counts = [len(part.rows) for part in parts]
    files = np.cumsum([0, *(len(part.files) for part in parts)], dtype=np.int32)[:-1]
    keys = np.cumsum([0, *(len(part.keys) for part in parts)])[:-1]
    rows = np.concatenate([np.zeros(0, _ROW), *(part.rows for part in parts)])
    rows["file"] += np.where(rows["file"] < 0, np.int32(0), np.repeat(files, counts))
    rows["key_end"] += np.repeat(keys, counts)
    text = np.concatenate([np.zeros(0, np.uint8), *(part.keys for part in parts)])
    return SampleIndex(rows, text, [file for part in parts for file in part.files])


def scan_shard(address: Callable[[str], str], sidecar: Sidecar) -> SampleIndex:
    """Index one shard from its headers.

    Args:
        address: name in the output folder -> path or URL.
        sidecar: of the shard.

    Raises:
        ShardError: the shard or a packed file is damaged or does not match the sidecar.
    """
    path = address(sidecar.shard)
    layouts = [_layout(address(file.name), file.rows) for file in sidecar.packed]
    chunk = 1 << 22 if is_remote(path) else 1 << 13
    reader = Reader(partial(read_range, path), size_of(path), chunk=chunk)

    def take(member: Member) -> bytes | None:
        """Read JSON and labels along with the headers."""
        wanted = member.kind == "file" and member.name.lower().endswith((".json", ".cls"))
        return reader.take(member.size) if wanted and member.size <= MAX_LABEL_BYTES else None

    rows: list[tuple[int, ...]] = []
    text = bytearray()
    for sample, texts in walk_samples(reader, shown(path), take, lambda problem: _refuse(path, problem)):
        text += sample.key.encode("utf-8", "surrogateescape")
        rows.append(_row(path, sample, texts, layouts, len(text)))
    if len(rows) != sidecar.output.samples:
        raise ShardError(
            f"{shown(path)} holds {len(rows)} samples, not {sidecar.output.samples}; delete it and encode "
            "again"
        )
    index = SampleIndex(np.array(rows, _ROW), np.frombuffer(bytes(text), np.uint8), layouts)
    for number, layout in enumerate(layouts):
        packed = np.sort(index.rows["latent"][index.rows["file"] == number])
        if not np.array_equal(packed, np.arange(layout.rows)):
            raise ShardError(
                f"{shown(path)} and {shown(layout.path)} hold different samples; delete both and encode again"
            )
    return index


def _row(
    path: str, sample: Sample, texts: dict[str, bytes], layouts: Sequence[PackedLayout], key_end: int
) -> tuple[int, ...]:
    """The numbers of one sample, in the order of `_ROW`."""
    there = {extension: (offset, size) for extension, offset, size in sample.members}
    texts = dict.fromkeys(there, b"") | texts  # members that are too long count as damaged
    try:
        info = json.loads(texts[JSON_MEMBER])
        height, width = bucket_of(info)
        if LATENT_MEMBER in there:
            offset, size = there[LATENT_MEMBER]
            latent, file = offset - sample.start, -1
        else:
            latent, size, end = info["row"], 0, f".latents-{height}x{width}.safetensors"
            file = next(number for number, layout in enumerate(layouts) if layout.path.endswith(end))
    except (KeyError, ValueError, TypeError, StopIteration) as error:
        raise ShardError(
            f"sample {sample.key!r} of {shown(path)} holds no latent; delete the shard and encode again"
        ) from error
    try:
        label = label_of(texts.get("cls"), texts.get("json"))
    except ValueError:
        label = BAD_LABEL
    label = -1 if label is None else label
    return sample.start, label, key_end, sample.end - sample.start, latent, size, file, height, width


def _layout(path: str, rows: int) -> PackedLayout:
    """Parse the header of a packed file (safetensors: u64 length, JSON, tensors)."""
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
            f"{shown(path)} holds {problem.name!r} ({problem.reason}); delete it and run the same encode "
            "command again"
        )


def label_of(cls: bytes | None, text: bytes | None) -> int | None:
    """The class label of a sample. A whole number may be written as 3, "3", 3.0 or true.

    Args:
        cls: the member `cls`, which takes precedence.
        text: the member `json`.

    Returns:
        The class from 0; None if there is no label, or it is empty, null or -1.

    Raises:
        ValueError: the label is no class number. The message says what was found.
    """
    try:
        record = json.loads(text) if cls is None and text is not None else None
    except (ValueError, RecursionError):
        raise ValueError("a json that can't be read") from None
    value = record.get("label") if isinstance(record, dict) else None
    if cls is not None:
        value = cls.decode("utf-8", "replace").strip()
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


def has_label(shards: Iterable[str]) -> bool:
    """Whether the first sample of image shards has a class label. True if there are no samples.

    Raises:
        ShardError: a shard can't be read.
        DataError: the label is no class number.
    """
    for path in shards:
        reader = Reader(partial(read_range, path), size_of(path), chunk=1 << 13)

        def take(member: Member, reader: Reader = reader) -> bytes | None:
            wanted = member.name.lower().endswith((".cls", ".json")) and member.size <= MAX_LABEL_BYTES
            return reader.take(member.size) if wanted else None

        for sample, texts in walk_samples(reader, shown(path), take, lambda problem: None):
            try:
                return label_of(texts.get("cls"), texts.get("json")) is not None
            except ValueError as error:
                raise DataError(
                    f"sample {sample.key!r} of {shown(path)} has {error}, {CLASS_NUMBERS}"
                ) from None
    return True

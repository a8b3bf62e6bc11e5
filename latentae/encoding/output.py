"""Latent shards on their way to the output: samples in the order of the input, hashed as they are written, whole or not there.

The latents are in the tar, or packed: stacked in one file beside it for each image size. A packed file's values are collected in
nameless temporary files, one for each tensor, since its header comes first and says how many there are.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from latentae.data.sources import shown, size_of
from latentae.encoding.places import JSON_MEMBER, LATENT_MEMBER
from latentae.encoding.samples import Begin, End, Skipped, Source
from latentae.encoding.sidecar import (
    PackedFile,
    ShardFile,
    Sidecar,
    finished_sidecar,
    packed_name,
    sidecar_name,
    write_sidecar,
)
from latentae.encoding.store import Store
from latentae.errors import OutputError, ShardError
from latentae.models.latent_statistics import LatentStatistics
from latentae.progress import say

__all__ = ["NON_FINITE", "Encoded", "Finished", "write_shards"]

NON_FINITE = "non-finite latent"
_SHOWN = 3  # skipped samples of a shard that are named
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # of safetensors


@dataclass(frozen=True)
class Encoded:
    """Samples and their latents: mean, logvar[, mean_flip, logvar_flip] in the stored type, [n, z, h, w] each."""

    samples: list[Source]
    latents: dict[str, Tensor]


@dataclass(frozen=True)
class Finished:
    """All of a shard has been encoded."""

    end: End
    batch_sizes: list[int]


Event = Begin | Skipped | Encoded | Finished


def write_shards(
    events: Iterator[Event],
    store: Store,
    *,
    channels: int,
    fingerprint: str,
    packed: bool,
    flip: bool,
    batch_size: int,
) -> Iterator[Sidecar]:
    """Write each shard and then its sidecar; one that fails leaves nothing under its name.

    Args:
        events: for each shard Begin, then what became of its samples in any order, then Finished.
        store: the output.
        channels, fingerprint, packed, flip, batch_size: see ShardSettings.

    Raises:
        ShardError: an input changed while it was read.
        OutputError: the output can't be written.
    """
    for begin in events:
        assert isinstance(begin, Begin)
        own = _until_finished(events)
        output = _Output(store, begin, channels, packed)
        try:
            end = output.write(own)
        except OutputError:
            sidecar = finished_sidecar(store, begin.name, fingerprint, begin.bytes)
            if sidecar is None:
                raise
            for _ in own:  # another task did the same shard, and took what we were writing for a leftover
                continue
        else:
            sidecar = Sidecar(
                shard=begin.name,
                fingerprint=fingerprint,
                input=end.end.input,
                output=output.files[0],
                packed=output.packed_files,
                flip=flip,
                skipped=dict(output.skipped),
                batch_size=batch_size,
                batch_sizes=end.batch_sizes,
                statistics=output.statistics.to_json(),
            )
            write_sidecar(store, sidecar)
        yield sidecar


def _until_finished(events: Iterator[Event]) -> Iterator[Event]:
    for event in events:
        yield event
        if isinstance(event, Finished):
            return


class _Hashed:
    """A file that is hashed as it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._bytes += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._bytes

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


@dataclass
class _Output:
    """One shard that is being written."""

    store: Store
    begin: Begin
    channels: int
    packed: bool
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    files: list[ShardFile] = field(default_factory=list)
    packed_files: list[PackedFile] = field(default_factory=list)

    def write(self, events: Iterator[Event]) -> Finished:
        """Write everything but the sidecar; returns the last event."""
        self.store.remove(sidecar_name(self.begin.name))  # what it vouched for is about to go
        self.statistics = LatentStatistics.empty(self.channels)
        with ExitStack() as stack:
            path = stack.enter_context(self.store.write(self.begin.name))
            packs: dict[tuple[int, int], _Pack] = {}
            with path.open("wb") as file:
                hashed = _Hashed(file)
                with tarfile.open(fileobj=hashed, mode="w", format=tarfile.PAX_FORMAT) as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
                    end = self._write_samples(events, tar, packs, stack, path.parent)
                if size_of(self.begin.source) != self.begin.bytes:
                    raise ShardError(
                        f"{shown(self.begin.source)} changed while it was encoded; run the same command again once it is complete"
                    )
                self.files.append(
                    ShardFile(samples=self.statistics.samples, bytes=hashed.tell(), sha256=hashed.sha256)
                )
            for (height, width), pack in packs.items():
                name = packed_name(self.begin.name, height, width)
                self.packed_files.append(pack.write(name, stack.enter_context(self.store.write(name))))
        return end

    def _write_samples(
        self,
        events: Iterator[Event],
        tar: tarfile.TarFile,
        packs: dict[tuple[int, int], _Pack],
        stack: ExitStack,
        folder: Path,
    ) -> Finished:
        ready: dict[int, Skipped | tuple[Source, dict[str, Tensor]]] = {}
        messages: list[str] = []
        position = 0
        for event in events:
            if isinstance(event, Finished):
                self._tell(messages)
                return event
            ready.update(_by_position(event))
            while (item := ready.pop(position, None)) is not None:
                position += 1
                if isinstance(item, Skipped):
                    self.skipped[item.reason].append(item.key)
                    messages += [item.message] if len(messages) < _SHOWN else []
                    continue
                sample, latents = item
                self.statistics = self.statistics.merge(
                    LatentStatistics.of(latents["mean"], latents["logvar"])
                )
                info = sample.info
                if self.packed:
                    size = (info["bucket"][0], info["bucket"][1])
                    if size not in packs:
                        packs[size] = stack.enter_context(_Pack(folder))
                    info = {**info, "row": packs[size].add(latents)}
                else:
                    _add(tar, f"{sample.key}.{LATENT_MEMBER}", safetensors_bytes(latents))
                _add(tar, f"{sample.key}.{JSON_MEMBER}", json.dumps(info).encode())
                for extension, data in sample.members.items():
                    _add(tar, f"{sample.key}.{extension}", data)
        raise AssertionError("the events of a shard end with Finished")

    def _tell(self, messages: list[str]) -> None:
        count = sum(len(keys) for keys in self.skipped.values())
        if count:
            reasons = ", ".join(f"{len(keys)} ({reason})" for reason, keys in self.skipped.items())
            more = f"; and {count - len(messages)} more" if count > len(messages) else ""
            say(f"encode: {self.begin.name}: skipped {reasons}: {'; '.join(messages)}{more}")


def _by_position(event: Any) -> Iterator[tuple[int, Skipped | tuple[Source, dict[str, Tensor]]]]:
    """What became of each sample of an event; those that the stored type can't hold are skipped."""
    if isinstance(event, Skipped):
        yield event.position, event
        return
    assert isinstance(event, Encoded)
    finite = (
        torch.stack([latent.isfinite().flatten(1).all(1) for latent in event.latents.values()])
        .all(0)
        .tolist()
    )
    for row, sample in enumerate(event.samples):
        if finite[row]:
            yield (
                sample.position,
                (sample, {name: latent[row].contiguous() for name, latent in event.latents.items()}),
            )
        else:
            yield sample.position, Skipped(sample.position, sample.key, NON_FINITE, sample.key)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)  # time, owner and group are zero or empty from the start, the mode is 0644
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


class _Pack:
    """The latents of one image size, in nameless files until their number is known.

    Args:
        folder: on the disk of the output.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._rows = folder, 0
        self._stack = ExitStack()
        self._spools: dict[str, IO[bytes]] = {}
        self._shape: tuple[int, ...] = ()
        self._type = ""

    def __enter__(self) -> _Pack:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, latents: Mapping[str, Tensor]) -> int:
        """Append tensors [z, h, w]; returns their row."""
        for name, latent in latents.items():
            if name not in self._spools:
                self._spools[name] = self._stack.enter_context(TemporaryFile(dir=self._folder))  # noqa: SIM115 (closed by the stack)
                self._shape, self._type = tuple(latent.shape), _NAMES[latent.dtype]
            self._spools[name].write(latent.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self._rows += 1
        return self._rows - 1

    def write(self, name: str, path: Path) -> PackedFile:
        """Write all rows as a safetensors file at `path`, to be called `name`."""
        header: dict[str, Any] = {}
        position = 0
        for key in sorted(self._spools):
            size = self._spools[key].tell()
            header[key] = {
                "dtype": self._type,
                "shape": [self._rows, *self._shape],
                "data_offsets": [position, position + size],
            }
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the values are aligned
        with path.open("wb") as file:
            hashed = _Hashed(file)
            hashed.write(struct.pack("<Q", len(text)) + text)
            for key in sorted(self._spools):
                self._spools[key].seek(0)
                while block := self._spools[key].read(1 << 20):
                    hashed.write(block)
        return PackedFile(name=name, bytes=hashed.tell(), sha256=hashed.sha256, rows=self._rows)

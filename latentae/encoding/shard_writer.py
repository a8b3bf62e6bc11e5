"""Write latent shards atomically: samples in the order of the input, hashed while written.

Latents go into the tar or, packed, into one file per image size next to it. The header of a packed
file comes first and has the number of latents, so its values are collected in temporary files.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from latentae.data.sources import shard_changed, size_of
from latentae.data.tars import add_member
from latentae.encoding.image_batches import Skipped, Source
from latentae.encoding.latent_shard import JSON_MEMBER, LATENT_MEMBER
from latentae.encoding.plan import Shard, ShardSettings
from latentae.encoding.sidecar import PackedFile, ShardFile, Sidecar, packed_name, sidecar_name, write_sidecar
from latentae.encoding.store import Store
from latentae.errors import OutputError
from latentae.models.latent_statistics import LatentStatistics
from latentae.progress import say

__all__ = ["Encoded", "Finished", "write_shards"]

_SHOWN = 3  # skipped samples per shard that are logged with their reason
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # in safetensors


class Encoded(NamedTuple):
    """Samples and their latents in the stored type: mean, logvar[, mean_flip, logvar_flip]."""

    samples: list[Source]
    latents: dict[str, Tensor]


class Finished(NamedTuple):
    """End of a shard."""

    input: ShardFile
    batch_sizes: list[int]
    """See Sidecar."""


Event = Shard | Skipped | Encoded | Finished


def write_shards(events: Iterator[Event], store: Store, settings: ShardSettings) -> Iterator[Sidecar]:
    """Write each shard, then its sidecar. A shard that fails leaves no files.

    Args:
        events: for each shard the Shard, its samples in any order, then Finished.
        store: the output.
        settings: of the job.

    Raises:
        ShardError: an input changed while it was read.
        OutputError: the output can't be written.
    """
    for shard in events:
        assert isinstance(shard, Shard)
        own = _until_finished(events)
        try:
            sidecar = _Output(store, shard, settings).write(own)
        except OutputError:
            sidecar = shard.finished(store, settings.fingerprint)
            if sidecar is None:
                raise
            for _ in own:  # another task wrote this shard and removed our temporary files
                continue
        else:
            write_sidecar(store, sidecar)
        yield sidecar


def _until_finished(events: Iterator[Event]) -> Iterator[Event]:
    for event in events:
        yield event
        if isinstance(event, Finished):
            return


class _Hashed:
    """A file that is hashed while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._bytes += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._bytes

    @property
    def facts(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


class _Output:
    """The shard being written."""

    def __init__(self, store: Store, shard: Shard, settings: ShardSettings) -> None:
        self.store, self.shard, self.settings = store, shard, settings
        self.statistics = LatentStatistics.empty(settings.latent_channels)
        self.skipped: dict[str, list[str]] = defaultdict(list)
        self.packs: dict[tuple[int, int], _Pack] = {}

    def write(self, events: Iterator[Event]) -> Sidecar:
        """Write the tar and the packed files, and return the sidecar to write."""
        shard, options = self.shard, self.settings.options
        self.store.remove(sidecar_name(shard.name))  # its files are about to be replaced
        packed: list[PackedFile] = []
        with ExitStack() as stack:
            path = stack.enter_context(self.store.write(shard.name))
            with path.open("wb") as file:
                hashed = _Hashed(file)
                with tarfile.open(fileobj=hashed, mode="w", format=tarfile.PAX_FORMAT) as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
                    end = self._write_samples(events, tar, stack, path.parent)
            if size_of(shard.source) != shard.bytes:
                raise shard_changed(shard.source)
            for (height, width), pack in self.packs.items():
                name = packed_name(shard.name, height, width)
                packed.append(pack.write(name, stack.enter_context(self.store.write(name))))
        return Sidecar(
            shard=shard.name,
            fingerprint=self.settings.fingerprint,
            input=end.input,
            output=ShardFile(samples=self.statistics.samples, **hashed.facts),
            packed=packed,
            flip=options.flip,
            skipped=dict(self.skipped),
            batch_size=options.batch_size,
            batch_sizes=end.batch_sizes,
            statistics=self.statistics.to_json(),
        )

    def _write_samples(
        self, events: Iterator[Event], tar: tarfile.TarFile, stack: ExitStack, folder: Path
    ) -> Finished:
        ready: dict[int, Skipped | tuple[Source, dict[str, Tensor]]] = {}
        messages: list[str] = []
        position = 0
        for event in events:
            if isinstance(event, Finished):
                self._log(messages)
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
                if self.settings.options.packed:
                    size = (info["bucket"][0], info["bucket"][1])
                    if size not in self.packs:
                        self.packs[size] = stack.enter_context(_Pack(folder))
                    info = {**info, "row": self.packs[size].add(latents)}
                else:
                    add_member(tar, f"{sample.key}.{LATENT_MEMBER}", safetensors_bytes(latents))
                add_member(tar, f"{sample.key}.{JSON_MEMBER}", json.dumps(info).encode())
                for extension, data in sample.members.items():
                    add_member(tar, f"{sample.key}.{extension}", data)
        raise AssertionError("the events of a shard end with Finished")

    def _log(self, messages: list[str]) -> None:
        count = sum(map(len, self.skipped.values()))
        if count:
            reasons = ", ".join(f"{len(keys)} ({reason})" for reason, keys in self.skipped.items())
            more = f"; and {count - len(messages)} more" if count > len(messages) else ""
            say(f"encode: {self.shard.name}: skipped {reasons}: {'; '.join(messages)}{more}")


def _by_position(event: Event) -> Iterator[tuple[int, Skipped | tuple[Source, dict[str, Tensor]]]]:
    """Each sample of an event by its position. Samples with non-finite latents are skipped."""
    if isinstance(event, Skipped):
        yield event.position, event
        return
    assert isinstance(event, Encoded)
    finite = torch.stack([latent.isfinite().flatten(1).all(1) for latent in event.latents.values()]).all(0)
    for row, (sample, good) in enumerate(zip(event.samples, finite.tolist(), strict=True)):
        if good:
            latents = {name: latent[row].contiguous() for name, latent in event.latents.items()}
            yield sample.position, (sample, latents)
        else:
            yield sample.position, Skipped(sample.position, sample.key, "non-finite latent", sample.key)


class _Pack:
    """The latents of one image size, collected in unnamed temporary files.

    Args:
        folder: for the temporary files, on the disk of the output.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._rows, self._stack = folder, 0, ExitStack()
        self._spools: dict[str, IO[bytes]] = {}
        self._header: dict[str, Any] = {}

    def __enter__(self) -> _Pack:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, latents: Mapping[str, Tensor]) -> int:
        """Append tensors [z, h, w] and return their row."""
        for name, latent in latents.items():
            if name not in self._spools:
                self._spools[name] = self._stack.enter_context(TemporaryFile(dir=self._folder))  # noqa: SIM115 (closed by the stack)
                self._header[name] = {"dtype": _NAMES[latent.dtype], "shape": list(latent.shape)}
            self._spools[name].write(latent.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self._rows += 1
        return self._rows - 1

    def write(self, name: str, path: Path) -> PackedFile:
        """Write all rows as a safetensors file at `path`, to be named `name`."""
        header: dict[str, Any] = {}
        position = 0
        for key, spool in sorted(self._spools.items()):
            end = position + spool.tell()
            shape = [self._rows, *self._header[key]["shape"]]
            header[key] = {**self._header[key], "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligns the values
        with path.open("wb") as file:
            hashed = _Hashed(file)
            hashed.write(struct.pack("<Q", len(text)) + text)
            for _, spool in sorted(self._spools.items()):
                spool.seek(0)
                while block := spool.read(1 << 20):
                    hashed.write(block)
        return PackedFile(name=name, rows=self._rows, **hashed.facts)

"""Sidecars: the small file next to each latent shard that marks it as complete and describes it.

`<shard>.tar.done.json` is written after the shard and its packed files have their final names, so
it never refers to an incomplete shard. Its content does not depend on when, where or in how many
runs the shards were encoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from latentae.encoding.store import LocalStore, Store, open_store
from latentae.errors import OutputError
from latentae.files import json_bytes
from latentae.models.latent_statistics import LatentStatistics

__all__ = [
    "FORMAT_VERSION",
    "PackedFile",
    "ShardFile",
    "Sidecar",
    "listed_shards",
    "open_output",
    "packed_name",
    "parse_sidecar",
    "read_sidecar",
    "read_sidecars",
    "sidecar_name",
    "write_sidecar",
]

FORMAT_VERSION = 2  # version 1 had no packed files and no flips
_SUFFIX = ".done.json"
DIGEST = "digest"  # key of the sidecar's own SHA-256


class ShardFile(BaseModel):
    """Size, SHA-256 and number of samples of a tar."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int
    bytes: int
    sha256: str


class PackedFile(BaseModel):
    """A file of stacked latents next to a tar."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Path inside the output folder, see `packed_name`."""
    bytes: int
    sha256: str
    rows: int


class Sidecar(BaseModel):
    """Description of a finished latent shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1, 2] = FORMAT_VERSION
    shard: str
    """Path inside the output folder, with forward slashes."""
    fingerprint: str
    """SHA-256 of the weights, config, preprocessing and stored type; one per output folder."""
    input: ShardFile
    output: ShardFile
    packed: list[PackedFile] = []
    """Files of stacked latents; empty if the latents are in the tar."""
    flip: bool = False
    """Whether the posteriors of the flipped images are stored."""
    skipped: dict[str, list[str]]
    """Keys of skipped samples, by reason."""
    batch_size: int
    """Images per batch. Another batch size may change the last bits of the latents."""
    batch_sizes: list[int] = []
    """Smaller batch sizes used after running out of memory."""
    statistics: dict[str, Any]

    @field_validator("statistics")
    @classmethod
    def _readable(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            LatentStatistics.from_json(value)
        except (KeyError, TypeError) as error:
            raise ValueError(str(error)) from error
        return value

    @property
    def skips(self) -> int:
        """Number of skipped samples."""
        return sum(map(len, self.skipped.values()))

    @property
    def files(self) -> dict[str, ShardFile | PackedFile]:
        """The tar and its packed files, by name."""
        return {self.shard: self.output, **{file.name: file for file in self.packed}}

    def fits(self, sizes: Mapping[str, int | None]) -> bool:
        """Whether the tar and its packed files have the sizes recorded here."""
        return all(sizes.get(name) == file.bytes for name, file in self.files.items())

    def is_of(self, fingerprint: str, input_bytes: int) -> bool:
        """Whether the shard belongs to the job with this fingerprint and an input of this size."""
        return self.fingerprint == fingerprint and self.input.bytes == input_bytes


def sidecar_name(shard: str) -> str:
    """The name of a latent shard's sidecar."""
    return shard + _SUFFIX


def packed_name(shard: str, height: int, width: int) -> str:
    """The name of the file of stacked latents for a shard's images of `height` x `width` pixels."""
    return f"{shard.removesuffix('.tar')}.latents-{height}x{width}.safetensors"


def listed_shards(sizes: Mapping[str, int]) -> list[str]:
    """Sorted names of the latent shards whose sidecar is among the files in `sizes`."""
    return sorted(name.removesuffix(_SUFFIX) for name in sizes if name.endswith(_SUFFIX))


def write_sidecar(store: Store, sidecar: Sidecar) -> None:
    """Mark a shard as complete. Its files must have their final names and content."""
    fields = {**sidecar.model_dump(), DIGEST: _digest(sidecar)}
    store.write_bytes(sidecar_name(sidecar.shard), json_bytes(fields))


def _digest(sidecar: Sidecar) -> str:
    """SHA-256 of all other fields, so that a flipped bit is noticed."""
    return hashlib.sha256(json.dumps(sidecar.model_dump(), sort_keys=True).encode()).hexdigest()


def parse_sidecar(data: bytes | None, shard: str) -> Sidecar | None:
    """Parse the sidecar of `shard`. Returns None if it is missing, damaged or of another shard."""
    try:
        fields = json.loads(data or b"")
        digest = fields.pop(DIGEST, None)
        sidecar = Sidecar.model_validate(fields)
    except (ValueError, AttributeError, TypeError):  # pydantic's error is a ValueError
        return None
    valid = sidecar.format_version == 1 or digest == _digest(sidecar)
    return sidecar if valid and sidecar.shard == shard else None


def read_sidecar(store: Store, shard: str, sizes: Mapping[str, int] | None = None) -> Sidecar | None:
    """The sidecar of `shard`, or None if it is missing, damaged or does not match the files' sizes.

    Args:
        store: the output.
        shard: name of the latent shard.
        sizes: sizes of all files; by default the store reads those of this shard.
    """
    if sizes is not None and sidecar_name(shard) not in sizes:
        return None
    sidecar = parse_sidecar(store.read(sidecar_name(shard)), shard)
    if sidecar is None:
        return None
    found = sizes if sizes is not None else {name: store.size(name) for name in sidecar.files}
    return sidecar if sidecar.fits(found) else None


def read_sidecars(store: Store, shards: Sequence[str], sizes: Mapping[str, int]) -> Iterator[Sidecar | None]:
    """`read_sidecar` of each shard, in order, by several threads."""
    threads = 8 if isinstance(store, LocalStore) else 32
    with ThreadPoolExecutor(threads) as pool:
        remaining = iter(shards)
        while batch := list(islice(remaining, 8 * threads)):
            yield from pool.map(lambda shard: read_sidecar(store, shard, sizes), batch)


def open_output(out: str | Path) -> tuple[Store, dict[str, Any]]:
    """Open an output of `encode`, finished or not, and read the record of its job.

    Raises:
        OutputError: the folder was not written by `encode`, or can't be read.
    """
    store = open_store(out)
    record = store.record()
    if record.get("verb") != "encode" or not isinstance(record.get("inputs"), Mapping):
        raise OutputError(
            f"{store.shown} was written by latentae {record.get('verb')}; give an output of latentae encode"
        )
    return store, record

"""The small file beside each latent shard that says: this shard is whole, and this is what it holds.

`<shard>.tar.done.json` is written after the shard and its packed files have their final names, so it never vouches for half a shard. It
holds nothing that depends on when, where or in how many pieces the work was done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from latentae.encoding.store import Store
from latentae.files import json_bytes
from latentae.models.latent_statistics import LatentStatistics

__all__ = [
    "FORMAT_VERSION",
    "SUFFIX",
    "PackedFile",
    "ShardFile",
    "Sidecar",
    "finished_sidecar",
    "fits",
    "is_of",
    "packed_name",
    "parse_sidecar",
    "read_sidecar",
    "sidecar_name",
    "write_sidecar",
]

FORMAT_VERSION = 2  # 1 had neither packed files nor flips
SUFFIX = ".done.json"
DIGEST = "digest"  # of a sidecar, in itself


class ShardFile(BaseModel):
    """One tar: how large it is, what it hashes to, how many samples it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int
    bytes: int
    sha256: str


class PackedFile(BaseModel):
    """One file of stacked latents beside a tar."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Its path inside the output folder, see `packed_name`."""
    bytes: int
    sha256: str
    rows: int


class Sidecar(BaseModel):
    """What is known of one finished latent shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1, 2] = FORMAT_VERSION
    shard: str
    """Its path inside the output folder, with forward slashes."""
    fingerprint: str
    """Of the weights, config, preprocessing and stored type; one per output folder."""
    input: ShardFile
    output: ShardFile
    packed: list[PackedFile] = []
    """Where the latents are, if not in the tar."""
    flip: bool = False
    """Whether the posterior of the mirrored image is stored too."""
    skipped: dict[str, list[str]]
    """Keys left out, by reason."""
    batch_size: int
    """Another one may change the last bits of the latents."""
    batch_sizes: list[int] = []
    """The smaller ones it came down to where memory ran out."""
    statistics: dict[str, Any]

    @field_validator("statistics")
    @classmethod
    def _readable(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            LatentStatistics.from_json(value)
        except (KeyError, TypeError) as error:
            raise ValueError(str(error)) from error
        return value


def sidecar_name(shard: str) -> str:
    """Name of a latent shard -> name of its sidecar."""
    return shard + SUFFIX


def packed_name(shard: str, height: int, width: int) -> str:
    """Where the latents of a shard's images of `height` x `width` pixels are stacked."""
    return f"{shard.removesuffix('.tar')}.latents-{height}x{width}.safetensors"


def write_sidecar(store: Store, sidecar: Sidecar) -> None:
    """Vouch for a shard, which must have its final name and content."""
    store.write_bytes(
        sidecar_name(sidecar.shard), json_bytes({**sidecar.model_dump(), DIGEST: _digest(sidecar)})
    )


def parse_sidecar(data: bytes | None, shard: str) -> Sidecar | None:
    """The content of the sidecar of `shard`, or None where it is missing, damaged, or of another shard."""
    try:
        fields = json.loads(data or b"")
        digest = fields.pop(DIGEST, None)
        sidecar = Sidecar.model_validate(fields)
    except (ValueError, AttributeError, TypeError):  # pydantic's error is a ValueError
        return None
    whole = digest == _digest(sidecar) if sidecar.format_version > 1 else True
    return sidecar if whole and sidecar.shard == shard else None


def _digest(sidecar: Sidecar) -> str:
    """Of everything else in the file: a flipped bit there could vouch for something else."""
    return hashlib.sha256(json.dumps(sidecar.model_dump(), sort_keys=True).encode()).hexdigest()


def fits(sidecar: Sidecar, sizes: Mapping[str, int | None]) -> bool:
    """Whether the shard and its packed files have the sizes that the sidecar says."""
    return sizes.get(sidecar.shard) == sidecar.output.bytes and all(
        sizes.get(f.name) == f.bytes for f in sidecar.packed
    )


def read_sidecar(store: Store, shard: str) -> Sidecar | None:
    """The sidecar of `shard`, or None where it is missing, damaged, or does not fit the files' sizes."""
    sidecar = parse_sidecar(store.read(sidecar_name(shard)), shard)
    if sidecar is None:
        return None
    return (
        sidecar
        if fits(sidecar, {name: store.size(name) for name in (shard, *(f.name for f in sidecar.packed))})
        else None
    )


def finished_sidecar(store: Store, shard: str, fingerprint: str, input_bytes: int) -> Sidecar | None:
    """The sidecar of `shard` if it is done for this very job and its input has kept its size, else None."""
    sidecar = read_sidecar(store, shard)
    return sidecar if sidecar is not None and is_of(sidecar, fingerprint, input_bytes) else None


def is_of(sidecar: Sidecar, fingerprint: str, input_bytes: int) -> bool:
    """Whether a sidecar is of the job with this fingerprint, and of an input of this size."""
    return sidecar.fingerprint == fingerprint and sidecar.input.bytes == input_bytes

"""The small file beside each latent shard that says: this shard is whole, and this is what it holds.

`<shard>.tar.done.json` is written after the shard has its final name, so it never vouches for half a shard. It holds nothing
that depends on when, where or in how many pieces the work was done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from latentae.files import write_json
from latentae.models.latent_statistics import LatentStatistics

__all__ = [
    "FORMAT_VERSION",
    "STATISTICS",
    "SUFFIX",
    "ShardFile",
    "Sidecar",
    "finished_sidecar",
    "read_sidecar",
    "sidecar_path",
    "write_sidecar",
]

FORMAT_VERSION = 1
SUFFIX = ".done.json"
STATISTICS = "statistics.json"  # in an output folder: the statistics of all its shards


class ShardFile(BaseModel):
    """One tar: how large it is, what it hashes to, how many samples it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int
    bytes: int
    sha256: str


class Sidecar(BaseModel):
    """What is known of one finished latent shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = FORMAT_VERSION
    shard: str
    """Its path inside the output folder, with forward slashes."""
    fingerprint: str
    """Of the weights, config, preprocessing and stored type; one per output folder."""
    input: ShardFile
    output: ShardFile
    skipped: dict[str, list[str]]
    """Keys left out, by reason."""
    batch_size: int
    """Another one may change the last bits of the latents."""
    statistics: dict[str, Any]

    @field_validator("statistics")
    @classmethod
    def _readable(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            LatentStatistics.from_json(value)
        except (KeyError, TypeError) as error:
            raise ValueError(str(error)) from error
        return value


def sidecar_path(shard: Path) -> Path:
    """Where the sidecar of a latent shard lies."""
    return shard.with_name(shard.name + SUFFIX)


def write_sidecar(shard: Path, sidecar: Sidecar) -> None:
    """Vouch for `shard`, which must have its final name and content."""
    write_json(sidecar_path(shard), sidecar.model_dump())


def read_sidecar(shard: Path) -> Sidecar | None:
    """The sidecar of `shard`, or None where it is missing, damaged, or does not fit the shard's size."""
    try:
        sidecar = Sidecar.model_validate_json(sidecar_path(shard).read_bytes())
        return sidecar if shard.stat().st_size == sidecar.output.bytes else None
    except (OSError, ValidationError):
        return None


def finished_sidecar(shard: Path, fingerprint: str, input_bytes: int) -> Sidecar | None:
    """The sidecar of `shard` if it is done for this very job and its input has kept its size, else None."""
    sidecar = read_sidecar(shard)
    if sidecar is None or sidecar.fingerprint != fingerprint or sidecar.input.bytes != input_bytes:
        return None
    return sidecar

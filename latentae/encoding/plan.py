"""The plan of an encoding: shards, their output names and settings, the same on every machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from latentae.data.order import Bucket
from latentae.data.shard_index import ShardIndex
from latentae.data.sources import is_remote, shown
from latentae.encoding.options import EncodeOptions
from latentae.encoding.sidecar import Sidecar, read_sidecar, read_sidecars
from latentae.encoding.store import Store
from latentae.errors import ShardError
from latentae.jobs import Job

__all__ = [
    "Encoder",
    "Shard",
    "ShardSettings",
    "Work",
    "find_finished",
    "output_names",
    "plan_digest",
    "plan_shards",
]

Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]
"""uint8 images [B, C, H, W] -> mean and logvar [B, z, h, w], fp32 on the CPU."""


@dataclass(frozen=True)
class ShardSettings:
    """What all shards of a job share."""

    options: EncodeOptions
    fingerprint: str
    """SHA-256 of everything that changes the latents, see `Sidecar`."""
    buckets: tuple[Bucket, ...]
    """Sizes (height, width) in pixels to choose from by aspect ratio, or the square."""
    in_channels: int
    """Channels of the images: 1 (gray), 3 (RGB) or 4 (RGB and alpha)."""
    latent_channels: int
    workers: int = 0
    """Decoding threads. With 0 everything runs in the caller's thread."""
    pin: bool = False
    """Whether to put images into page-locked memory, for a GPU."""


@dataclass(frozen=True)
class Shard:
    """A shard of images and the latent shard it becomes."""

    source: str
    """Path or URL of the images."""
    name: str
    """Path of the latent shard inside the output folder, with forward slashes."""
    samples: int = 0
    """Samples in the source; 0 if unknown."""
    bytes: int = 0
    """Size of the source."""

    def finished(self, store: Store, fingerprint: str) -> Sidecar | None:
        """The sidecar if the shard is done for this job and its input has the same size."""
        sidecar = read_sidecar(store, self.name)
        return sidecar if sidecar is not None and sidecar.is_of(fingerprint, self.bytes) else None


@dataclass(frozen=True)
class Work:
    """A claimed job and this task's share of it."""

    job: Job
    store: Store
    settings: ShardSettings
    make_encoder: Callable[[], Encoder]
    """Loads the model. It can be pickled for another process, which chooses its own device."""
    plan: list[Shard]
    """All shards of the job."""
    mine: list[Shard]
    """The shards of this task."""
    pending: list[Shard]
    """The shards of this task that are not done."""
    task: str
    """For messages: "task 1 of 4" or "this task"."""


def plan_shards(index: ShardIndex) -> list[Shard]:
    """All shards of a job, sorted by name."""
    names = output_names([entry.path for entry in index.shards])
    shards = [Shard(entry.path, names[entry.path], entry.samples, entry.bytes) for entry in index.shards]
    return sorted(shards, key=lambda shard: shard.name)


def plan_digest(shards: Sequence[Shard]) -> str:
    """Hex digest of names, sizes and sample counts."""
    facts = [[shard.name, shard.bytes, shard.samples] for shard in shards]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def find_finished(
    store: Store, plan: Sequence[Shard], fingerprint: str, sizes: Mapping[str, int]
) -> Iterator[tuple[Shard, Sidecar | None]]:
    """Each shard with the result of `Shard.finished`, in order. Takes one request per sidecar."""
    sidecars = read_sidecars(store, [shard.name for shard in plan], sizes)
    for shard, sidecar in zip(plan, sidecars, strict=True):
        yield shard, sidecar if sidecar is not None and sidecar.is_of(fingerprint, shard.bytes) else None


def output_names(shards: Sequence[str]) -> dict[str, str]:
    """The path of each shard inside the output folder: its path below the deepest common folder.

    Shards of one folder keep their bare names. Shards of different folders keep distinct names. A
    URL counts by scheme, host and path, without its query.

    Raises:
        ShardError: a shard is given twice, or the shards are on different drives or file systems.
    """
    parts = {shard: _parts(shard) for shard in shards}
    common = os.path.commonprefix([part[:-1] for part in parts.values()])  # noqa: RUF071 (of tuples)
    if shards and not common:
        raise ShardError(
            "the shards are on different drives or file systems and share no folder; encode each into its "
            "own output"
        )
    names = {shard: "/".join(part[len(common) :]) for shard, part in parts.items()}
    seen: set[str] = set()
    for shard in shards:
        base = names[shard].removesuffix(".tar")  # packed files are named by it
        if base in seen:
            raise ShardError(
                f"shard {shown(shard)} is given twice, or once with and once without .tar; name it once"
            )
        seen.add(base)
    return names


def _parts(shard: str) -> tuple[str, ...]:
    """Drive or scheme, then folders, then the file name."""
    if not is_remote(shard):
        return Path(os.path.normpath(Path(shard).absolute())).parts
    scheme, _, rest = shown(shard).partition("://")
    parts = [part for part in rest.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ShardError(f"{shown(shard)} contains '..'; give the address without it")
    return (f"{scheme}://", *parts)

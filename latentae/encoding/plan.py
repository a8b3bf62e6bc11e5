"""Who encodes what, and where it goes: planned from names and sizes alone, the same on every machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

from latentae.data.shard_index import ShardIndex
from latentae.data.sources import is_remote, shown
from latentae.encoding.sidecar import Sidecar, finished_sidecar, fits, is_of, parse_sidecar, sidecar_name
from latentae.encoding.store import Store
from latentae.errors import ShardError
from latentae.files import INCOMPLETE, abandoned

__all__ = [
    "Shard",
    "find_finished",
    "output_names",
    "plan_digest",
    "plan_shards",
    "read_sidecars",
    "remove_leftovers",
]

THREADS = 32  # that read remote sidecars; they wait for the server


@dataclass(frozen=True)
class Shard:
    """One unit of work: a shard of images and the shard of latents it becomes."""

    source: str
    name: str
    """Path of the output inside the output folder, with forward slashes."""
    samples: int
    bytes: int

    def finished(self, store: Store, fingerprint: str) -> Sidecar | None:
        """Its sidecar if it is done for the job with this fingerprint and the input has kept its size, else None."""
        return finished_sidecar(store, self.name, fingerprint, self.bytes)


def plan_shards(index: ShardIndex) -> list[Shard]:
    """All the work of a job, sorted by name."""
    names = output_names([entry.path for entry in index.shards])
    shards = [Shard(entry.path, names[entry.path], entry.samples, entry.bytes) for entry in index.shards]
    return sorted(shards, key=lambda shard: shard.name)


def find_finished(
    store: Store, plan: Sequence[Shard], fingerprint: str, sizes: Mapping[str, int]
) -> Iterator[tuple[Shard, Sidecar | None]]:
    """Each shard of `plan` and what `Shard.finished` says of it, in order, given the sizes of all files; one request per sidecar."""
    names = [shard.name for shard in plan]
    for shard, sidecar in zip(plan, read_sidecars(store, names, sizes), strict=True):
        yield shard, sidecar if sidecar is not None and is_of(sidecar, fingerprint, shard.bytes) else None


def read_sidecars(store: Store, names: Sequence[str], sizes: Mapping[str, int]) -> Iterator[Sidecar | None]:
    """The sidecar of each shard named, as `read_sidecar` has it, given the sizes of all files; a few are in memory at a time."""

    def one(name: str) -> Sidecar | None:
        if sidecar_name(name) not in sizes:
            return None
        sidecar = parse_sidecar(store.read(sidecar_name(name)), name)
        return sidecar if sidecar is not None and fits(sidecar, sizes) else None

    if store.is_local:
        yield from map(one, names)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        remaining = iter(names)
        while batch := list(islice(remaining, 8 * THREADS)):
            yield from pool.map(one, batch)


def plan_digest(shards: Sequence[Shard]) -> str:
    """Hex digest of names, sizes and sample counts; the same work has the same digest, however its shards were listed."""
    facts = [[shard.name, shard.bytes, shard.samples] for shard in shards]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def output_names(shards: Sequence[str]) -> dict[str, str]:
    """Where each shard goes inside the output folder: its path below the deepest folder that all of them share.

    Shards of one folder keep their bare names; same-named shards of different folders can't meet. A URL counts by scheme, host and
    path, without its query.

    Raises:
        ShardError: a shard is given twice, or they lie on different drives or file systems.
    """
    places = {shard: _parts(shard) for shard in shards}
    if len({parts[0] for parts in places.values()}) > 1:
        raise ShardError(
            "the shards lie on different drives or file systems and share no folder; encode each into its own output"
        )
    folders = [parts[:-1] for parts in places.values()]
    shared = takewhile(
        lambda pair: pair[0] == pair[1], zip(min(folders), max(folders), strict=False)
    )  # sorted: all are between
    depth = sum(1 for _ in shared)
    names = {shard: "/".join(parts[depth:]) for shard, parts in places.items()}
    seen: set[str] = set()
    for shard in shards:
        base = names[shard].removesuffix(".tar")  # packed files are named by it
        if base in seen:
            raise ShardError(
                f"shard {shown(shard)} is given twice, or once with and once without .tar; name each shard once"
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
        raise ShardError(f"{shown(shard)} goes up with '..'; give the address without it")
    return (f"{scheme}://", *parts)


def remove_leftovers(store: Store) -> None:
    """Remove what killed writers left anywhere in the output; those of the living stay, and those that may be alive elsewhere.

    Only what is on a disk of this machine has leftovers that can be told from files.
    """
    if store.is_local:
        for leftover in store.local().rglob(f".*{INCOMPLETE}"):
            if abandoned(leftover):
                leftover.unlink(missing_ok=True)  # another task may be faster

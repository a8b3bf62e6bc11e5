"""What is in a set of shards: names, sizes and sample counts, from each folder's `index.json` or from the tars themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentae.data.shards import shard_keys
from latentae.errors import ShardError
from latentae.files import read_json, write_json

__all__ = ["FORMAT_VERSION", "INDEX_NAME", "ShardEntry", "ShardIndex", "load_index", "scan_shard", "write_index"]

FORMAT_VERSION = 1
INDEX_NAME = "index.json"


@dataclass(frozen=True)
class ShardEntry:
    """One shard: where it is, its file name, how many samples it holds, and its size."""

    path: str
    name: str
    samples: int
    bytes: int


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a data set, in order."""

    format_version: int
    shards: tuple[ShardEntry, ...]

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def digest(self) -> str:
        """Hex digest of names, sizes and sample counts: the same data set has the same digest wherever it lies."""
        facts = [[shard.name, shard.bytes, shard.samples] for shard in self.shards]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def scan_shard(path: str | Path) -> ShardEntry:
    """Read one shard's headers; ShardError if it is missing or damaged."""
    keys = shard_keys(path)
    return ShardEntry(str(path), Path(path).name, len(keys), Path(path).stat().st_size)


def load_index(shards: Sequence[str]) -> ShardIndex:
    """The index of these shard files, in this order.

    A folder's `index.json` is believed for every shard whose size it knows; the others are scanned.

    Raises:
        ShardError: a shard is missing or damaged, or all of them are empty.
    """
    known: dict[Path, dict[str, tuple[int, int]]] = {}
    entries = []
    for path in shards:
        folder, name = Path(path).parent, Path(path).name
        if folder not in known:
            known[folder] = _read_index(folder / INDEX_NAME)
        size, samples = known[folder].get(name, (-1, 0))
        try:
            matches = Path(path).stat().st_size == size
        except OSError:
            matches = False
        entries.append(ShardEntry(str(path), name, samples, size) if matches else scan_shard(path))
    index = ShardIndex(FORMAT_VERSION, tuple(entries))
    if not index.samples:
        raise ShardError(
            f"no samples in {len(entries)} shards ({', '.join(entry.path for entry in entries[:3])}); make them from images again"
        )
    return index


def write_index(folder: str | Path, entries: Iterable[ShardEntry]) -> ShardIndex:
    """Write a folder's `index.json` and return it as an index."""
    index = ShardIndex(FORMAT_VERSION, tuple(entries))
    rows = [{"name": entry.name, "samples": entry.samples, "bytes": entry.bytes} for entry in index.shards]
    record = {"format_version": FORMAT_VERSION, "samples": index.samples, "digest": index.digest, "shards": rows}
    write_json(Path(folder) / INDEX_NAME, record)
    return index


def _read_index(path: Path) -> dict[str, tuple[int, int]]:
    """`{shard name: (bytes, samples)}`; empty where the file is missing, foreign or newer, for then the tars can tell."""
    try:
        record: Any = read_json(path)
        if record["format_version"] != FORMAT_VERSION:
            return {}
        return {row["name"]: (int(row["bytes"]), int(row["samples"])) for row in record["shards"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}

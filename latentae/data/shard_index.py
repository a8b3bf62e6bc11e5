"""What is in a set of shards: an index of each (`NAME.tar.index`), the manifest of all, and single samples read by them."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from latentae.data.reading import read_samples
from latentae.data.scanning import SAMPLE_DAMAGE, Scan, marks_match, scan
from latentae.data.sources import is_remote, name_of, read_range, shown, size_of
from latentae.data.tables import SampleTable, open_table
from latentae.data.tars import Problem
from latentae.errors import OutputError, ShardError
from latentae.files import atomic_file, write_json
from latentae.progress import Progress, say

__all__ = [
    "FORMAT_VERSION",
    "INDEX_NAME",
    "SUFFIX",
    "IndexFiles",
    "SampleTable",
    "ShardEntry",
    "ShardIndex",
    "load_index",
    "read_samples",
    "scan_shard",
    "write_index",
]

FORMAT_VERSION = 2
INDEX_NAME = "index.json"
SUFFIX = ".index"  # of a shard's own index, after its whole name
OPEN_TABLES = 64  # indexes of shards that a process keeps open
_SOON = 1 << 30  # bytes of local shards whose headers are read within seconds
THREADS = 16  # that look for the indexes of many shards; they wait for disks and servers


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard: where it is, its file name, how many samples it holds, and its size."""

    path: str
    name: str
    samples: int
    bytes: int
    sha256: str = field(default="", compare=False)
    """Of the whole file; empty where it was indexed by its headers alone."""
    headers: str = ""
    """Hex digest of its keys, members and where they lie."""


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a data set, in order: the manifest. Each shard's own index is opened when it is asked for."""

    shards: tuple[ShardEntry, ...]
    sources: tuple[str | bytes, ...] = field(default=(), compare=False, repr=False)
    """Where each shard's index is: a file, a URL, or its bytes where it could not be written."""

    @cached_property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """Hex digest of names, sizes, keys and members of all shards: the same data set has the same one wherever it lies."""
        facts = [[shard.name, shard.bytes, shard.samples, shard.headers] for shard in self.shards]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def names(self) -> Iterator[tuple[str, str]]:
        """The key and the shard's path of each sample, in order."""
        for number, shard in enumerate(self.shards):
            for key in self.table(number).keys():  # noqa: SIM118 (no mapping)
                yield key, shown(shard.path)

    def table(self, number: int) -> SampleTable:
        """The index of one shard; a few dozen stay open.

        Raises:
            ShardError: its file is gone, damaged, or of another shard by now.
        """
        tables = self._tables()
        table = tables.get(number)
        if table is None:
            table = self._open(number)
            tables[number] = table
            while len(tables) > OPEN_TABLES:
                tables.popitem(last=False)
        else:
            tables.move_to_end(number)
        return table

    def _tables(self) -> OrderedDict[int, SampleTable]:
        """One store in each thread, left behind when the index is pickled."""
        store = self.__dict__.get("_store")
        if store is None:
            store = threading.local()
            object.__setattr__(self, "_store", store)
        if not hasattr(store, "tables"):
            store.tables = OrderedDict()
        return store.tables

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self.shards, "sources": self.sources}

    def _open(self, number: int) -> SampleTable:
        entry, source = self.shards[number], self.sources[number]
        try:
            table = _open(source)
        except (OSError, ValueError) as error:
            raise ShardError(
                f"the index of shard {shown(entry.path)} can't be read ({error}); run `latentae index` again"
            ) from None
        if (table.samples, table.record["bytes"], table.record["headers"]) != (
            entry.samples,
            entry.bytes,
            entry.headers,
        ):
            raise ShardError(
                f"shard {shown(entry.path)} has changed since the start; start again with the shards as they are"
            )
        return table


def _open(source: str | bytes) -> SampleTable:
    if isinstance(source, str) and is_remote(source):
        return open_table(read_range(source, 0, size_of(source)))
    return open_table(source)


@dataclass(frozen=True)
class IndexFiles:
    """Where the indexes of some shards lie.

    Args:
        shards: local or remote paths.
        folder: one folder for all indexes; None is beside each shard.

    Raises:
        ShardError: two shards of one name would share an index file.
    """

    shards: tuple[str, ...]
    folder: Path | None

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        seen: dict[str, str] = {}
        for path in self.shards:
            other = seen.setdefault(name_of(path), path)
            if other != path:
                raise ShardError(
                    f"{shown(other)} and {shown(path)} have one name, and so would their indexes in {self.folder}; "
                    "index each folder of shards into its own folder"
                )

    def of(self, shard: str) -> str:
        """The index file of a shard: a path, or a URL beside a remote shard."""
        if self.folder is not None:
            return str(self.folder / (name_of(shard) + SUFFIX))
        if not is_remote(shard):
            return shard + SUFFIX
        address, mark, query = shard.partition("?")
        return address + SUFFIX + mark + query

    def open(self, shard: str) -> SampleTable | None:
        """The index of a shard, if there is one that can be read."""
        try:
            return _open(self.of(shard))
        except (OSError, ValueError):
            return None
        except ShardError:  # none beside a remote shard
            return None

    def find(self, shard: str) -> SampleTable | None:
        """The index of a shard, if there is one and it fits; None otherwise.

        Raises:
            ShardError: the shard itself is missing or can't be read.
        """
        size, table = size_of(shard), self.open(shard)
        fits = (
            table is not None and table.record["bytes"] == size and marks_match(shard, table.record["marks"])
        )
        return table if fits else None

    def write(self, shard: str, data: bytes) -> str:
        """Keep a new index; returns where.

        Raises:
            OutputError: it can't be written, or an index of another shard of this name is there.
        """
        target = self.of(shard)
        if is_remote(target):
            raise OutputError(
                f"the index of {shown(shard)} can't be written beside it; name a folder for indexes"
            )
        self._refuse_other(shard, Path(target))
        with atomic_file(target) as temporary:
            temporary.write_bytes(data)
        return target

    def _refuse_other(self, shard: str, target: Path) -> None:
        if self.folder is None:
            return
        table = self.open(shard)
        place = "" if table is None else table.record["place"]
        if place not in ("", self.place(shard)):
            raise OutputError(
                f"{target} is the index of {place}; choose another folder for the index of {shown(shard)}"
            )

    def place(self, shard: str) -> str:
        """Where a shard lies, for the record of an index that does not lie beside it."""
        if self.folder is None:
            return ""
        return shown(shard) if is_remote(shard) else str(Path(shard).absolute())


def entry_of(path: str, table: SampleTable) -> ShardEntry:
    """What the manifest says of a shard."""
    record = table.record
    return ShardEntry(
        path, name_of(path), table.samples, record["bytes"], record["sha256"], record["headers"]
    )


def scan_shard(path: str | Path) -> ShardEntry:
    """Read a shard from end to end and write its index beside it, where it holds samples.

    Raises:
        ShardError: it is missing or damaged.
        OutputError: the index can't be written.
    """
    path = str(path)
    found = scan(path, hashed=True)
    _refuse_damage(path, found)
    if found.samples:
        IndexFiles((path,), None).write(path, found.data)
    return _entry(path, found)


def write_index(folder: str | Path, entries: Iterable[ShardEntry]) -> ShardIndex:
    """Write a folder's manifest `index.json` and return it as an index; the shards' own indexes lie beside them."""
    entries = tuple(entries)
    sources = (
        entry.path + SUFFIX if entry.samples else scan(entry.path, hashed=False).data for entry in entries
    )
    index = ShardIndex(entries, tuple(sources))
    write_manifest(folder, index)
    return index


def write_manifest(folder: str | Path, index: ShardIndex) -> None:
    """Write `index.json`: names, sizes, counts and hashes of the shards, and the digest of all."""
    rows = [
        {
            "name": entry.name,
            "samples": entry.samples,
            "bytes": entry.bytes,
            "sha256": entry.sha256,
            "headers": entry.headers,
        }
        for entry in index.shards
    ]
    record = {
        "format_version": FORMAT_VERSION,
        "samples": index.samples,
        "digest": index.digest,
        "shards": rows,
    }
    write_json(Path(folder) / INDEX_NAME, record)


def load_index(shards: Sequence[str], folder: str | Path | None = None, *, build: bool = True) -> ShardIndex:
    """The index of these shards, in this order.

    Each shard's own index is taken from beside it or from `folder`, if it fits the shard (its size, and the header blocks at its
    ends). The missing ones are made from the shards' headers, in parallel, and kept there, or in memory where they can't be.

    Args:
        shards: local files or URLs, as from `expand_shards`.
        folder: where the indexes lie; None is beside each shard.
        build: make what is missing; remote shards need a folder for that.

    Raises:
        ShardError: a shard is missing or damaged, has no index that fits and none may be made, or all of them are empty.
    """
    paths = tuple(str(path) for path in shards)
    files = IndexFiles(paths, None if folder is None else Path(folder))
    with ThreadPoolExecutor(min(THREADS, len(paths) or 1)) as pool:
        found = list(pool.map(lambda path: _glance(files, path), paths))
    missing = [path for path, pair in zip(paths, found, strict=True) if pair is None]
    if missing:
        made = _build(files, missing, build)
        found = [pair or made[path] for path, pair in zip(paths, found, strict=True)]
    pairs = [pair for pair in found if pair is not None]
    index = ShardIndex(tuple(entry for entry, _ in pairs), tuple(source for _, source in pairs))
    if not index.samples:
        raise ShardError(
            f"no samples in {len(paths)} shards ({', '.join(shown(path) for path in paths[:3])}); make them from images again"
        )
    return index


_Pair = tuple[ShardEntry, "str | bytes"]


def _glance(files: IndexFiles, path: str) -> _Pair | None:
    table = files.find(path)
    return None if table is None else (entry_of(path, table), files.of(path))


def _build(files: IndexFiles, missing: list[str], build: bool) -> dict[str, _Pair]:
    """Make indexes from headers alone."""
    remote = next((path for path in missing if is_remote(path)), None)
    if not build or (remote and files.folder is None):
        where = files.folder or "beside it"
        raise ShardError(
            f"{len(missing)} shards have no index that fits, the first is {shown(remote or missing[0])} (looked {where}); "
            "run `latentae index SHARDS FOLDER` and name that folder"
        )
    for path in missing:
        if files.open(path) is not None:
            say(f"the index of {shown(path)} no longer fits it and is made again")
    stop = threading.Event()
    quiet = not remote and sum(size_of(path) for path in missing) < _SOON
    progress = Progress("indexing", total=len(missing), unit="shards", quiet=quiet)
    made: dict[str, _Made] = {}
    with progress, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        running = [pool.submit(_make, files, path, stop) for path in missing]
        try:
            for future in as_completed(running):
                made[future.result().entry.path] = future.result()
                progress.advance()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _tell(list(made.values()))
    return {path: (one.entry, one.source) for path, one in made.items()}


@dataclass(frozen=True)
class _Made:
    entry: ShardEntry
    source: str | bytes
    unwritten: str
    """Why the index stays in memory; empty where it was written."""
    left_out: Problem | None


def _make(files: IndexFiles, path: str, stop: threading.Event) -> _Made:
    found = scan(path, hashed=False, place=files.place(path), stop=stop)
    _refuse_damage(path, found)
    left_out = next((problem for problem in found.problems if problem.code == "left_out"), None)
    try:
        return _Made(_entry(path, found), files.write(path, found.data), "", left_out)
    except OutputError as error:  # a read-only folder, say
        return _Made(_entry(path, found), found.data, str(error), left_out)


def _tell(made: list[_Made]) -> None:
    unwritten = [one.unwritten for one in made if one.unwritten]
    if unwritten:
        say(
            f"{unwritten[0]}; {len(unwritten)} indexes stay in memory and will be made again at the next start"
        )
    left_out = [(shown(one.entry.path), one.left_out) for one in made if one.left_out]
    if left_out:
        path, problem = left_out[0]
        say(
            f"{len(left_out)} shards hold files that are no part of an image sample and are left out, the first is "
            f"{problem.name!r} in {path} ({problem.reason}); `latentae index` lists them"
        )


def _entry(path: str, found: Scan) -> ShardEntry:
    return ShardEntry(path, name_of(path), found.samples, found.bytes, found.sha256, found.headers)


def _refuse_damage(path: str, found: Scan) -> None:
    """Damaged samples are left out only after `latentae index` has listed them."""
    bad = next((problem for problem in found.problems if problem.code in SAMPLE_DAMAGE), None)
    if bad is not None:
        raise ShardError(
            f"shard {shown(path)} holds {bad.name!r} at byte {bad.byte}, which can't be used ({bad.reason}); write it again, or let "
            "`latentae index` list all such samples and leave them out"
        )

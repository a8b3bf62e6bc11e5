"""The index of a set of shards: a table per shard (`NAME.tar.index`) and a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from latentae.data.sources import is_remote, name_of, read_range, shown, size_of
from latentae.data.tables import SampleTable, marks_match, open_table, scan
from latentae.data.tars import Problem
from latentae.errors import OutputError, ShardError
from latentae.files import atomic_file, write_json
from latentae.progress import Progress, say

__all__ = [
    "INDEX_NAME",
    "SUFFIX",
    "IndexFiles",
    "SampleTable",
    "ShardEntry",
    "ShardIndex",
    "entry_of",
    "in_parallel",
    "load_index",
    "scan_shard",
    "write_index",
    "write_manifest",
]

FORMAT_VERSION = 2
INDEX_NAME = "index.json"
SUFFIX = ".index"  # appended to a shard's name for its own index
OPEN_TABLES = 64  # indexes of shards that a process keeps open
_SOON = 1 << 30  # bytes of local shards whose headers are read within seconds
THREADS = 16  # that look for the indexes of many shards; they wait for disks and servers

_T = TypeVar("_T")
_R = TypeVar("_R")
_Source = str | bytes  # of a shard's index: a file, a URL, or its bytes if it could not be written


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard of a manifest: path or URL, file name, number of samples, and size in bytes."""

    path: str
    name: str
    samples: int
    bytes: int
    sha256: str = field(default="", compare=False)
    """Of the complete file; empty if only its headers were read."""
    headers: str = ""
    """Hex digest of its keys, members and their offsets."""


@dataclass(frozen=True)
class ShardIndex:
    """The manifest: the shards of a data set, in order.

    The index of each shard is opened at its first use.
    """

    shards: tuple[ShardEntry, ...]
    sources: tuple[_Source, ...] = field(default=(), compare=False, repr=False)
    """The index of each shard: a file, a URL, or its bytes if it could not be written."""

    @cached_property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """Hex digest of names, sizes, keys and members of all shards.

        It does not depend on their folder.
        """
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
            ShardError: its file is missing, damaged, or now of another shard.
        """
        return self._tables(number)

    @cached_property
    def _tables(self) -> Callable[[int], SampleTable]:
        return lru_cache(OPEN_TABLES)(self._open)

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self.shards, "sources": self.sources}

    def _open(self, number: int) -> SampleTable:
        entry, path = self.shards[number], shown(self.shards[number].path)
        try:
            table = _open(self.sources[number])
        except (OSError, ValueError) as error:
            advice = "run `latentae index` again"
            raise ShardError(f"the index of shard {path} can't be read ({error}); {advice}") from None
        if entry_of(entry.path, table) != entry:
            raise ShardError(f"shard {path} has changed since the start; start again with the current shards")
        return table


def _open(source: _Source) -> SampleTable:
    if isinstance(source, str) and is_remote(source):
        return open_table(read_range(source, 0, size_of(source)))
    return open_table(source)


@dataclass(frozen=True)
class IndexFiles:
    """The index files of some shards.

    Args:
        shards: local or remote paths.
        folder: one folder for all indexes; None is the folder of each shard.

    Raises:
        ShardError: two shards of one name would share an index file.
    """

    shards: tuple[str, ...]
    folder: Path | None

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for path in self.shards if self.folder is not None else ():
            other = seen.setdefault(name_of(path), path)
            if other != path:
                found = f"{shown(other)} and {shown(path)} have one name, and so would their indexes"
                raise ShardError(f"{found} in {self.folder}; index each folder of shards into its own folder")

    def of(self, shard: str) -> str:
        """The index file of a shard: a path, or a URL for a remote shard without a folder."""
        if self.folder is not None:
            return str(self.folder / (name_of(shard) + SUFFIX))
        if not is_remote(shard):
            return shard + SUFFIX
        address, mark, query = shard.partition("?")
        return address + SUFFIX + mark + query

    def open(self, shard: str) -> SampleTable | None:
        """The index of a shard; None if it is missing or damaged."""
        try:
            return _open(self.of(shard))
        except (OSError, ValueError, ShardError):  # ShardError: a missing remote index
            return None

    def find(self, shard: str) -> SampleTable | None:
        """The index of a shard; None if it is missing, damaged or does not fit the shard.

        Raises:
            ShardError: the shard itself is missing or can't be read.
        """
        size, table = size_of(shard), self.open(shard)
        if table is None or table.record["bytes"] != size or not marks_match(shard, table.record["marks"]):
            return None
        return table

    def write(self, shard: str, data: bytes) -> str:
        """Write a new index; returns its path.

        Raises:
            OutputError: it can't be written, or the file is the index of another shard of this
                name.
        """
        target = self.of(shard)
        if is_remote(target):
            raise OutputError(f"the index of {shown(shard)} can't be written next to it; name a folder")
        other = self.open(shard) if self.folder is not None else None
        if other is not None and other.record["place"] not in ("", self.place(shard)):
            found = f"{target} is the index of {other.record['place']}"
            raise OutputError(f"{found}; choose another folder for the index of {shown(shard)}")
        with atomic_file(target) as temporary:
            temporary.write_bytes(data)
        return target

    def place(self, shard: str) -> str:
        """The location of a shard, for the record of an index in another folder.

        Empty otherwise.
        """
        if self.folder is None:
            return ""
        return shown(shard) if is_remote(shard) else str(Path(shard).absolute())


def entry_of(path: str, table: SampleTable) -> ShardEntry:
    """The entry of a shard in the manifest."""
    facts = {name: table.record[name] for name in ("bytes", "sha256", "headers")}
    return ShardEntry(path, name_of(path), table.samples, **facts)


def scan_shard(path: str | Path) -> ShardEntry:
    """Read and hash a complete shard, and write its index next to it unless it is empty.

    Raises:
        ShardError: it is missing or damaged.
        OutputError: the index can't be written.
    """
    path = str(path)
    table = scan(path, hashed=True)
    _refuse_damage(path, table)
    if table.samples:
        IndexFiles((path,), None).write(path, table.data)
    return entry_of(path, table)


def write_index(folder: str | Path, entries: Iterable[ShardEntry]) -> ShardIndex:
    """Write a folder's manifest `index.json` and return it.

    The shards' own indexes are next to them.
    """
    entries = tuple(entries)
    sources = (e.path + SUFFIX if e.samples else scan(e.path, hashed=False).source for e in entries)
    index = ShardIndex(entries, tuple(sources))
    write_manifest(folder, index)
    return index


def write_manifest(folder: str | Path, index: ShardIndex) -> None:
    """Write `index.json`: names, sizes, counts and hashes of the shards, and the digest of all."""
    rows = [{name: value for name, value in asdict(e).items() if name != "path"} for e in index.shards]
    facts = {"format_version": FORMAT_VERSION, "samples": index.samples, "digest": index.digest}
    write_json(Path(folder) / INDEX_NAME, {**facts, "shards": rows})


def load_index(shards: Sequence[str], folder: str | Path | None = None, *, build: bool = True) -> ShardIndex:
    """The index of these shards, in this order.

    A shard's own index is used if it fits the shard (its size, and the header blocks at its ends).
    Missing indexes are built in parallel from the shards' headers, and written to files if
    possible.

    Args:
        shards: local files or URLs, as from `expand_shards`.
        folder: of the indexes; None is the folder of each shard.
        build: build missing indexes; remote shards need a folder for that.

    Raises:
        ShardError: a shard is missing or damaged, has no index that fits and `build` is false, or
            all shards are empty.
    """
    paths = tuple(str(path) for path in shards)
    files = IndexFiles(paths, None if folder is None else Path(folder))

    def find(path: str) -> tuple[ShardEntry, _Source] | None:
        table = files.find(path)
        return None if table is None else (entry_of(path, table), files.of(path))

    with ThreadPoolExecutor(min(THREADS, len(paths) or 1)) as pool:
        found = dict(zip(paths, pool.map(find, paths), strict=True))
    missing = [path for path in paths if found[path] is None]
    if missing:
        found |= _build(files, missing, build)
    pairs = [pair for path in paths if (pair := found[path]) is not None]
    index = ShardIndex(tuple(entry for entry, _ in pairs), tuple(source for _, source in pairs))
    if not index.samples:
        names = ", ".join(shown(path) for path in paths[:3])
        raise ShardError(f"no samples in {len(paths)} shards ({names}); pack them from images again")
    return index


def _build(files: IndexFiles, missing: list[str], build: bool) -> dict[str, tuple[ShardEntry, _Source]]:
    """Index shards by their headers only."""
    remote = next((path for path in missing if is_remote(path)), None)
    if not build or (remote and files.folder is None):
        where = f"in {files.folder}" if files.folder else "next to it"
        found = f"{len(missing)} shards have no index that fits, the first is {shown(remote or missing[0])}"
        advice = "run `latentae index SHARDS FOLDER` and name that folder"
        raise ShardError(f"{found} (looked {where}); {advice}")
    for path in missing:
        if files.open(path) is not None:
            say(f"the index of {shown(path)} no longer fits and is built again")
    stop = threading.Event()
    unwritten: list[str] = []
    left_out: list[tuple[str, Problem]] = []

    def make(path: str) -> tuple[ShardEntry, _Source]:
        table = scan(path, hashed=False, place=files.place(path), stop=stop)
        _refuse_damage(path, table)
        first = next((problem for problem in table.problems if problem.code == "left_out"), None)
        left_out.extend([(shown(path), first)] if first else [])
        try:
            return entry_of(path, table), files.write(path, table.data)
        except OutputError as error:  # such as a read-only folder
            unwritten.append(str(error))
            return entry_of(path, table), table.source

    quiet = not remote and sum(size_of(path) for path in missing) < _SOON
    with Progress("indexing", total=len(missing), unit="shards", quiet=quiet) as progress:
        pairs = in_parallel(make, missing, os.cpu_count() or 1, stop, progress.advance)
    if unwritten:
        say(f"{unwritten[0]}; {len(unwritten)} indexes stay in memory and are built again at the next start")
    if left_out:
        path, problem = left_out[0]
        found = f"{len(left_out)} shards contain files that are no part of an image sample and are left out"
        first = f"{problem.name!r} in {path} ({problem.reason})"
        say(f"{found}, the first is {first}; `latentae index` lists them")
    return dict(zip(missing, pairs, strict=True))


def in_parallel(
    function: Callable[[_T], _R],
    items: Sequence[_T],
    threads: int,
    stop: threading.Event,
    advance: Callable[[], object],
) -> list[_R]:
    """Results of a function for all items, in their order. On an error or Ctrl-C it ends soon.

    Args:
        function: called by several threads.
        items: its arguments.
        threads: number of threads.
        stop: set on an error, so that running calls can end.
        advance: called after each item.
    """
    results: dict[int, _R] = {}
    running: dict[Future[_R], int] = {}
    todo = iter(enumerate(items))
    with ThreadPoolExecutor(threads) as pool:
        try:
            while len(results) < len(items):
                while len(running) < 2 * threads and (item := next(todo, None)) is not None:
                    running[pool.submit(function, item[1])] = item[0]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    results[running.pop(future)] = future.result()
                    advance()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[number] for number in range(len(items))]


def _refuse_damage(path: str, table: SampleTable) -> None:
    """Damaged samples are skipped only after `latentae index` has listed them."""
    bad = next((problem for problem in table.problems if problem.code in ("twice", "outside", "name")), None)
    if bad is not None:
        found = f"{bad.name!r} at byte {bad.byte}, which can't be used ({bad.reason})"
        advice = "write it again, or run `latentae index` to list such samples and skip them"
        raise ShardError(f"shard {shown(path)} contains {found}; {advice}")

"""The verb `index`: every shard of a data set gets its index, and what is damaged gets listed."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from latentae.data.options import IndexOptions
from latentae.data.scanning import scan
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import IndexFiles, ShardEntry, ShardIndex, entry_of, write_manifest
from latentae.data.sources import is_remote, shown
from latentae.data.tables import SampleTable, open_table
from latentae.data.tars import DamagedTar, Problem
from latentae.errors import OutputError, ShardError
from latentae.files import abandoned, write_text
from latentae.options import verb
from latentae.progress import Progress, say

__all__ = ["DAMAGED", "Finding", "IndexSummary", "index"]

DAMAGED = "damaged.jsonl"
LEFT_OUT = "left out"
_SHOWN = 20  # findings that are printed


@dataclass(frozen=True)
class Finding:
    """Something that is damaged or not used.

    Attributes:
        shard: path or URL.
        level: `damaged shard` or `unread shard` (not indexed), `changed shard` (its SHA-256 differs from its index), `damaged
            sample` (not used), `bad image` (a sample that stays, but whose image has no header that can be read), `left out` (no
            part of an image sample: links, hidden files, samples without an image).
        name: of the member or sample; empty for a shard.
        byte: where it begins in the tar; None for a shard.
        reason: what is wrong.
    """

    shard: str
    level: str
    name: str
    byte: int | None
    reason: str


@dataclass(frozen=True)
class IndexSummary:
    """What `index` found.

    Attributes:
        index: of the shards that are whole; None where there is none.
        findings: damaged shards and samples, bad images and what was left out; at most 1000 for each shard.
        counts: how many of each level, those beyond the 1000 included.
    """

    index: ShardIndex | None
    findings: tuple[Finding, ...]
    counts: dict[str, int]

    @property
    def damaged(self) -> int:
        """Damaged, unread and changed shards, damaged samples and bad images."""
        return sum(count for level, count in self.counts.items() if level != LEFT_OUT)

    def __str__(self) -> str:
        """One line: what is indexed, and how much of each level was found."""
        shards = self.index.shards if self.index else ()
        samples = sum(shard.samples for shard in shards)
        parts = [f"{_counted(len(shards), 'shard')} indexed", _counted(samples, "sample")]
        return ", ".join([*parts, *(_counted(count, level) for level, count in sorted(self.counts.items()))])


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 or what == LEFT_OUT else f"{count} {what}s"


@verb(IndexOptions)
def index(options: IndexOptions) -> IndexSummary:
    """Index shards: where each sample lies, the size of its image, and the SHA-256 of every shard.

    Writes `NAME.tar.index` for each shard, whole or not at all, so that a run that was stopped goes on with those that are missing.
    With `out`, also `index.json` (the manifest of all) and `damaged.jsonl` (what is damaged or left out).

    Returns:
        What was found. Damage is no error: the undamaged shards are indexed all the same.

    Raises:
        ShardError: no shards, or one that can't be reached.
        OutputError: an index can't be written.
    """
    if options.workers is not None and options.workers < 1:
        raise OutputError(f"workers is {options.workers}, expected 1 or more")
    paths = tuple(expand_shards(options.shards))
    remote = next((path for path in paths if is_remote(path)), None)
    if remote and options.out is None:
        raise OutputError(
            f"the index of {shown(remote)} can't be written beside it; name a folder: latentae index SHARDS OUT"
        )
    files = IndexFiles(paths, None if options.out is None else Path(options.out))
    _remove_leftovers(files)
    run = _Run(files, options.verify)
    threads = options.workers or max(os.cpu_count() or 1, 4 if remote else 1)
    with (
        Progress("indexing", total=len(paths), unit="shards") as progress,
        ThreadPoolExecutor(threads) as pool,
    ):
        try:
            for _ in _in_parallel(pool, run, paths, 2 * threads):
                progress.advance(note=run.note())
        except BaseException:
            run.stop.set()
            raise
    summary = run.summary(paths)
    _record(files, summary)
    return summary


@dataclass(frozen=True)
class _Done:
    """What is kept of a shard that has its index."""

    entry: ShardEntry
    problems: list[Problem]
    counts: dict[str, int]

    @classmethod
    def of(cls, path: str, table: SampleTable) -> _Done:
        return cls(entry_of(path, table), table.problems, table.record["problem_counts"])


class _Run:
    """What several threads find out about shards."""

    def __init__(self, files: IndexFiles, verify: bool) -> None:
        self.files, self.verify, self.stop = files, verify, threading.Event()
        self.done: dict[str, _Done] = {}
        self.damage: dict[str, Finding] = {}
        self._began, self._bytes, self._lock = time.monotonic(), 0, threading.Lock()

    def advance(self, count: int) -> None:
        """Count bytes read."""
        with self._lock:
            self._bytes += count

    def note(self) -> str:
        """Speed so far, in words."""
        return f"{self._bytes / 1e6 / max(time.monotonic() - self._began, 1e-9):.0f} MB/s"

    def do(self, path: str) -> None:
        """Index or verify one shard; one that has an index that fits is left alone."""
        try:
            table = self.files.open(path) if self.verify else self.files.find(path)
            if table is None and self.files.open(path) is not None:
                say(f"the index of {shown(path)} no longer fits it and is made again")
            if table is None or self.verify or not table.record["sha256"]:
                found = scan(
                    path, hashed=True, place=self.files.place(path), stop=self.stop, advance=self.advance
                )
                if self.verify and table is not None and table.record["sha256"] not in ("", found.sha256):
                    reason = "its SHA-256 is not the one in its index; fetch it again, or remove its index to accept it as it is"
                    self.damage[path] = Finding(
                        shown(path), "changed shard", "", None, f"{shown(path)}: {reason}"
                    )
                    return
                table = open_table(self.files.write(path, found.data))
            self.done[path] = _Done.of(path, table)
        except ShardError as error:
            level = "damaged shard" if isinstance(error, DamagedTar) else "unread shard"
            self.damage[path] = Finding(shown(path), level, "", None, str(error))

    def summary(self, paths: Sequence[str]) -> IndexSummary:
        """Everything found, in the order of the shards."""
        whole = [path for path in paths if path in self.done]
        counts = Counter(finding.level for finding in self.damage.values())
        for done in self.done.values():
            for code, count in done.counts.items():
                counts[_level(code)] += count
        sources = tuple(self.files.of(path) for path in whole)
        manifest = ShardIndex(tuple(self.done[path].entry for path in whole), sources) if whole else None
        findings = tuple(finding for path in paths for finding in self._findings(path))
        return IndexSummary(manifest, findings, dict(counts))

    def _findings(self, path: str) -> Iterator[Finding]:
        if path in self.damage:
            yield self.damage[path]
            return
        for problem in self.done[path].problems:
            yield Finding(shown(path), _level(problem.code), problem.name, problem.byte, problem.reason)


def _level(code: str) -> str:
    return {"left_out": LEFT_OUT, "image": "bad image"}.get(code, "damaged sample")


def _in_parallel(pool: ThreadPoolExecutor, run: _Run, paths: Sequence[str], depth: int) -> Iterator[None]:
    """One step for each shard done; few are handed to the pool at a time, so that an error or Ctrl-C ends it soon."""
    todo = iter(paths)
    running: set[Future[None]] = set()
    while True:
        while len(running) < depth and (path := next(todo, None)) is not None:
            running.add(pool.submit(run.do, path))
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
            yield


def _record(files: IndexFiles, summary: IndexSummary) -> None:
    """The manifest and the list of findings, where there is a folder for them; what is damaged also in a few printed lines."""
    place = "give OUT to have them listed"
    if files.folder is not None:
        rows = (json.dumps(asdict(finding)) for finding in summary.findings)
        write_text(files.folder / DAMAGED, "".join(f"{row}\n" for row in rows))
        if summary.index is not None:
            write_manifest(files.folder, summary.index)
        place = f"all are in {files.folder / DAMAGED}"
    damaged = [finding for finding in summary.findings if finding.level != LEFT_OUT]
    for finding in damaged[:_SHOWN]:
        where = f" {finding.name!r} in {finding.shard}" if finding.byte is not None else ""
        say(f"{finding.level}{where}: {finding.reason}")
    if len(damaged) > _SHOWN:
        say(f"... and more; {place}")
    say(f"{summary}")


def _remove_leftovers(files: IndexFiles) -> None:
    """What killed indexers were writing."""
    folders = {
        Path(files.of(path)).parent
        for path in files.shards
        if files.folder is not None or not is_remote(path)
    }
    for folder in folders:
        for leftover in folder.glob(".*.index.*.incomplete"):
            if abandoned(leftover):
                leftover.unlink(missing_ok=True)  # another process may be faster

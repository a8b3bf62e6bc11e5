"""The verb `index`: index every shard of a data set, and list what is damaged."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from latentae.data.options import IndexOptions
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import (
    IndexFiles,
    ShardEntry,
    ShardIndex,
    entry_of,
    in_parallel,
    write_manifest,
)
from latentae.data.sources import is_remote, shown
from latentae.data.tables import scan
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
    """Something damaged or unused.

    Attributes:
        shard: path or URL.
        level: `damaged shard` and `unread shard` are not indexed. The SHA-256 of a `changed shard` differs from its index. A
            `damaged sample` is not used. A `bad image` is a sample that is used although the header of its image can't be
            read. `left out` is no part of an image sample: links, hidden files, samples without an image.
        name: of the member or sample; empty for a shard.
        byte: its first byte in the tar; None for a shard.
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
        index: of the complete shards; None if there are none.
        findings: damaged shards and samples, bad images and what was left out; at most 1000 per shard.
        counts: number of findings of each level, including those beyond the 1000.
    """

    index: ShardIndex | None
    findings: tuple[Finding, ...]
    counts: dict[str, int]

    @property
    def damaged(self) -> int:
        """Damaged, unread and changed shards, damaged samples and bad images."""
        return sum(count for level, count in self.counts.items() if level != LEFT_OUT)

    def __str__(self) -> str:
        """One line: what is indexed, and the number of findings of each level."""
        shards = self.index.shards if self.index else ()
        samples = sum(shard.samples for shard in shards)
        parts = [f"{_counted(len(shards), 'shard')} indexed", _counted(samples, "sample")]
        return ", ".join([*parts, *(_counted(count, level) for level, count in sorted(self.counts.items()))])


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 or what == LEFT_OUT else f"{count} {what}s"


@verb(IndexOptions)
def index(options: IndexOptions) -> IndexSummary:
    """Index shards: the offsets of all samples, the sizes of their images, and the SHA-256 of every shard.

    Writes `NAME.tar.index` for each shard, atomically, so that a stopped run resumes with the missing ones. With `out`, it
    also writes `index.json` (the manifest) and `damaged.jsonl` (what is damaged or left out).

    Returns:
        What was found. Damage is no error: the other shards are indexed.

    Raises:
        ShardError: no shards, or one that can't be reached.
        OutputError: an index can't be written.
    """
    paths = tuple(expand_shards(options.shards))
    remote = next((path for path in paths if is_remote(path)), None)
    if remote and options.out is None:
        raise OutputError(
            f"the index of {shown(remote)} can't be written next to it; name a folder: latentae index SHARDS OUT"
        )
    files = IndexFiles(paths, None if options.out is None else Path(options.out))
    _remove_leftovers(files)
    run = _Run(files, options.verify)
    threads = options.workers or max(os.cpu_count() or 1, 4 if remote else 1)
    with Progress("indexing", total=len(paths), unit="shards") as progress:
        in_parallel(run.do, paths, threads, run.stop, lambda: progress.advance(note=run.note()))
    summary = run.summary(paths)
    _record(files, summary)
    return summary


class _Run:
    """What several threads find in shards."""

    def __init__(self, files: IndexFiles, verify: bool) -> None:
        self.files, self.verify, self.stop = files, verify, threading.Event()
        self.done: dict[str, tuple[ShardEntry, list[Problem], dict[str, int]]] = {}
        self.damage: dict[str, Finding] = {}
        self._began, self._bytes, self._lock = time.monotonic(), 0, threading.Lock()

    def _advance(self, count: int) -> None:
        with self._lock:
            self._bytes += count

    def note(self) -> str:
        """The speed so far, for the progress line."""
        return f"{self._bytes / 1e6 / max(time.monotonic() - self._began, 1e-9):.0f} MB/s"

    def do(self, path: str) -> None:
        """Index or verify one shard; a shard whose index fits is skipped."""
        try:
            self._do(path)
        except ShardError as error:
            self._fail(path, "damaged shard" if isinstance(error, DamagedTar) else "unread shard", str(error))

    def _do(self, path: str) -> None:
        table = self.files.open(path) if self.verify else self.files.find(path)
        if table is None and self.files.open(path) is not None:
            say(f"the index of {shown(path)} no longer fits and is built again")
        if table is None or self.verify or not table.record["sha256"]:
            place = self.files.place(path)
            found = scan(path, hashed=True, place=place, stop=self.stop, advance=self._advance)
            if self.verify and table and table.record["sha256"] not in ("", found.record["sha256"]):
                reason = "its SHA-256 differs from its index; fetch it again, or remove its index to accept the new file"
                self._fail(path, "changed shard", f"{shown(path)}: {reason}")
                return
            table = found
            self.files.write(path, found.data)
        self.done[path] = entry_of(path, table), table.problems, table.record["problem_counts"]

    def _fail(self, path: str, level: str, reason: str) -> None:
        self.damage[path] = Finding(shown(path), level, "", None, reason)

    def summary(self, paths: Sequence[str]) -> IndexSummary:
        """Everything found, in the order of the shards."""
        good = [path for path in paths if path in self.done]
        counts = Counter(finding.level for finding in self.damage.values())
        for _, _, found in self.done.values():
            for code, count in found.items():
                counts[_level(code)] += count
        entries, sources = tuple(self.done[path][0] for path in good), tuple(map(self.files.of, good))
        findings = tuple(finding for path in paths for finding in self._findings(path))
        return IndexSummary(ShardIndex(entries, sources) if good else None, findings, dict(counts))

    def _findings(self, path: str) -> Iterator[Finding]:
        if path in self.damage:
            yield self.damage[path]
            return
        for problem in self.done[path][1]:
            yield Finding(shown(path), _level(problem.code), problem.name, problem.byte, problem.reason)


def _level(code: str) -> str:
    return {"left_out": LEFT_OUT, "image": "bad image"}.get(code, "damaged sample")


def _record(files: IndexFiles, summary: IndexSummary) -> None:
    """Write the manifest and the list of findings if there is a folder, and print the first damaged ones."""
    where = "give OUT to list them"
    if files.folder is not None:
        rows = (json.dumps(asdict(finding)) for finding in summary.findings)
        write_text(files.folder / DAMAGED, "".join(f"{row}\n" for row in rows))
        if summary.index is not None:
            write_manifest(files.folder, summary.index)
        where = f"all are in {files.folder / DAMAGED}"
    damaged = [finding for finding in summary.findings if finding.level != LEFT_OUT]
    for finding in damaged[:_SHOWN]:
        name = f" {finding.name!r} in {finding.shard}" if finding.byte is not None else ""
        say(f"{finding.level}{name}: {finding.reason}")
    if len(damaged) > _SHOWN:
        say(f"... and more; {where}")
    say(f"{summary}")


def _remove_leftovers(files: IndexFiles) -> None:
    """Remove temporary files of crashed runs."""
    local = [path for path in files.shards if files.folder is not None or not is_remote(path)]
    for folder in {Path(files.of(path)).parent for path in local}:
        for leftover in folder.glob(".*.index.*.incomplete"):
            if abandoned(leftover):
                leftover.unlink(missing_ok=True)  # another process may be faster

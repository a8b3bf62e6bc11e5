"""The verb `index`: index every shard of a data set, and list what is damaged."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

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
from latentae.data.tars import DamagedTar
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
        level: `damaged shard` and `unread shard` are not indexed. The SHA-256 of a `changed shard`
            differs from its index. A `damaged sample` is not used. A `bad image` is a sample that
            is used although the header of its image can't be read. `left out` is no part of an
            image sample: links, hidden files, samples without an image.
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
        findings: damaged shards and samples, bad images and what was left out; at most 1000 per
            shard.
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
    """Index shards: sample offsets, image sizes, and the SHA-256 of every shard.

    Writes `NAME.tar.index` for each shard, atomically, so that a stopped run resumes with the
    missing ones. With `out`, it also writes `index.json` (the manifest) and `damaged.jsonl` (what
    is damaged or left out).

    Returns:
        What was found. Damage is no error: the other shards are indexed.

    Raises:
        ShardError: no shards, or one that can't be reached.
        OutputError: an index can't be written.
    """
    paths = tuple(expand_shards(options.shards))
    remote = next((path for path in paths if is_remote(path)), None)
    if remote and options.out is None:
        advice = "name a folder: latentae index SHARDS OUT"
        raise OutputError(f"the index of {shown(remote)} can't be written next to it; {advice}")
    files = IndexFiles(paths, None if options.out is None else Path(options.out))
    _remove_leftovers(files)
    run = _Run(files, options.verify)
    threads = options.workers or max(os.cpu_count() or 1, 4 if remote else 1)
    with Progress("indexing", total=len(paths), unit="shards") as progress:
        found = in_parallel(run.do, paths, threads, run.stop, lambda: progress.advance(note=run.note()))
    entries = tuple(one.entry for one in found if one.entry)
    manifest = ShardIndex(entries, tuple(files.of(entry.path) for entry in entries)) if entries else None
    findings = tuple(itertools.chain.from_iterable(one.findings for one in found))
    counts = sum((one.counts for one in found), Counter[str]())
    summary = IndexSummary(manifest, findings, dict(counts))
    _record(files, summary)
    return summary


class _Found(NamedTuple):
    """What was found in one shard; the counts include findings that are not listed."""

    entry: ShardEntry | None
    findings: list[Finding]
    counts: Counter[str]


class _Run:
    """The work of several threads."""

    def __init__(self, files: IndexFiles, verify: bool) -> None:
        self.files, self.verify, self.stop = files, verify, threading.Event()
        self._began, self._bytes, self._lock = time.monotonic(), 0, threading.Lock()

    def _advance(self, count: int) -> None:
        with self._lock:
            self._bytes += count

    def note(self) -> str:
        """The speed so far, for the progress line."""
        return f"{self._bytes / 1e6 / max(time.monotonic() - self._began, 1e-9):.0f} MB/s"

    def do(self, path: str) -> _Found:
        """Index or verify one shard; a shard whose index fits is skipped."""
        try:
            return self._do(path)
        except ShardError as error:
            level = "damaged shard" if isinstance(error, DamagedTar) else "unread shard"
            return _failed(path, level, str(error))

    def _do(self, path: str) -> _Found:
        table = self.files.open(path) if self.verify else self.files.find(path)
        if table is None and self.files.open(path) is not None:
            say(f"the index of {shown(path)} no longer fits and is built again")
        if table is None or self.verify or not table.record["sha256"]:
            place = self.files.place(path)
            new = scan(path, hashed=True, place=place, stop=self.stop, advance=self._advance)
            if self.verify and table and table.record["sha256"] not in ("", new.record["sha256"]):
                advice = "fetch it again, or remove its index to accept the new file"
                reason = f"{shown(path)}: its SHA-256 differs from its index; {advice}"
                return _failed(path, "changed shard", reason)
            table = new
            self.files.write(path, new.data)
        findings = [Finding(shown(path), _level(p.code), p.name, p.byte, p.reason) for p in table.problems]
        counts = Counter[str]()
        for code, count in table.record["problem_counts"].items():
            counts[_level(code)] += count
        return _Found(entry_of(path, table), findings, counts)


def _failed(path: str, level: str, reason: str) -> _Found:
    return _Found(None, [Finding(shown(path), level, "", None, reason)], Counter([level]))


def _level(code: str) -> str:
    return {"left_out": LEFT_OUT, "image": "bad image"}.get(code, "damaged sample")


def _record(files: IndexFiles, summary: IndexSummary) -> None:
    """Write the manifest and all findings to the folder, and print the first damaged ones."""
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

"""Copies of checkpoints on another file system, for a machine or disk that may be lost.

URL/latentae.json       what job the copies are of URL/latest              the name of the newest
whole copy URL/step-00001000/      the files of a checkpoint; meta.json, with the SHA-256 of all, is
written last, so a copy without it is not whole

Object stores have no rename, may list what is gone and not list what is there. So nothing is
believed but the bytes: each file is read back after it was written, and a copy is taken only if all
its hashes fit.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

from latentae.data.sources import shown
from latentae.errors import MissingDependencyError, OutputError
from latentae.file_names import RECORD
from latentae.files import read_json, staged_folder, write_text
from latentae.jobs import first_difference
from latentae.models.pretrained import CHECKPOINTS, LATEST, META
from latentae.progress import say
from latentae.training.checkpoint import check_meta, discard, find_checkpoint
from latentae.training.claim import CLAIM

__all__ = ["Mirror", "UrlPlace"]

WAITS = (1.0, 5.0, 20.0, 60.0)  # seconds before each new try
_T = TypeVar("_T")
_NAME = re.compile(r"step-\d{8,}")
_BLOCK = 1 << 23


class _Damaged(Exception):
    """Other bytes than were written."""


class UrlPlace:
    """The claim at a mirror's address (a `ClaimPlace`). Object stores have no locks."""

    def __init__(self, mirror: Mirror) -> None:
        self.name, self._mirror = shown(mirror.url), mirror

    def read(self) -> bytes | None:
        """The claim that is there."""
        return self._mirror._try("read the claim", lambda: self._mirror._read(CLAIM))

    def write(self, data: bytes) -> None:
        """Replace the claim."""
        self._mirror._try("write the claim", lambda: self._mirror._write(CLAIM, data))

    def remove(self) -> None:
        """Remove the claim."""
        self._mirror._remove(CLAIM)

    def alone(self) -> None:
        """No lock."""


class Mirror:
    """Where the checkpoints of a run are copied to, and found again.

    Only the first process has one. What fails while the run goes on is said and counted, for the
    checkpoint on the disk is whole; what fails when it starts is an error, for it may be a wrong
    address.

    Args:
        url: a folder of any file system that fsspec knows.
        inputs: what makes two runs the same job, as plain JSON values.
        keep: newest copies kept.
        stopping: whether the run is asked to end; then nothing is tried twice.

    Attributes:
        failures: checkpoints that could not be copied.

    Raises:
        MissingDependencyError: the file system needs a package that is not there.
        OutputError: fsspec does not know the address.
    """

    def __init__(
        self, url: str, inputs: Mapping[str, Any], keep: int, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self.url, self.inputs, self.keep, self.stopping, self.failures = (
            url.rstrip("/"),
            dict(inputs),
            keep,
            stopping,
            0,
        )
        try:
            from fsspec.core import url_to_fs

            self._fs, root = url_to_fs(self.url)
        except ImportError as error:
            raise MissingDependencyError(
                f"checkpoint_url {shown(url)}: {error}; install it and try again"
            ) from error
        except ValueError as error:
            raise OutputError(
                f"checkpoint_url {shown(url)} can't be opened ({error}); use a scheme that fsspec knows"
            ) from error
        self._root = root.rstrip("/")

    def claim(self) -> None:
        """Make the address this job's, or find that it is.

        Raises:
            OutputError: it holds another job, or can't be read and written.
        """
        found = self._try(f"read {RECORD}", lambda: self._read(RECORD))
        if found is None:
            record = (
                json.dumps({"format_version": 1, "verb": "train", "inputs": self.inputs}, indent=2) + "\n"
            )
            self._try(f"write {RECORD}", lambda: self._write(RECORD, record.encode()))
            return
        try:
            there = json.loads(found)["inputs"]
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{shown(self.url)}/{RECORD} is damaged or not ours ({error}); choose another address"
            ) from error
        self._refuse_another(there)

    def _refuse_another(self, inputs: Any) -> None:
        difference = first_difference(inputs, self.inputs)
        if difference:
            raise OutputError(
                f"{shown(self.url)} holds checkpoints of another run: {difference}; choose another --checkpoint-url"
            )

    def newest(self, run: Path) -> Path | None:
        """The newest whole checkpoint of the run, on the disk or at the address.

        One that is only there is fetched, one only here copied.

        Raises:
            OutputError: the address can't be read, holds another job, or the disk is full.
            TrainingError: the newest copy is of a newer format.
        """
        here = find_checkpoint(run)
        if here is not None and not (here / META).is_file():
            here = None
        there = self._try("list the checkpoints", self._names)
        for name in there:
            if here is not None and name <= here.name:
                break
            folder = self._fetch(name, run)
            if folder is not None:
                return folder
        if here is not None and not self._has(here):
            self.push(here)
        return here

    def push(self, folder: Path) -> bool:
        """Copy a checkpoint and read it back, then name it the latest and drop the oldest copies.

        Returns:
            Whether it is there. If not, that was said: the run is not worth less than its copy.
        """
        try:
            digests = check_meta(read_json(folder / META), str(folder))
            self._try(
                "begin", lambda: self._remove(f"{folder.name}/{META}")
            )  # what lies there of another try is not whole from now on
            for file, digest in digests.items():
                self._try(
                    f"copy {file}", lambda f=file, d=digest: self._put(folder / f, f"{folder.name}/{f}", d)
                )
            self._try(
                f"copy {META}", lambda: self._write(f"{folder.name}/{META}", (folder / META).read_bytes())
            )
            self._try(f"write {LATEST}", lambda: self._write(LATEST, f"{folder.name}\n".encode()))
        except (OutputError, _Damaged) as error:
            self.failures += 1
            say(
                f"WARNING: {folder.name} was not copied: {error}; the run goes on with {folder} ({self.failures} not copied so far)"
            )
            return False
        try:
            self._try("remove old copies", lambda: self._prune(folder.name))
        except OutputError as error:
            say(f"WARNING: {error}; they are tried again after the next checkpoint")
        return True

    def _fetch(self, name: str, run: Path) -> Path | None:
        """One copy as a checkpoint of the run, now its latest.

        None, which is said, if the copy is not whole.
        """
        try:
            data = self._try(f"read {name}/{META}", lambda: self._read(f"{name}/{META}"))
            if data is None:
                raise _Damaged(f"it has no {META}")
            meta = json.loads(data)
            self._refuse_another(meta.get("inputs"))
            digests = check_meta(meta, f"{shown(self.url)}/{name}")
            folder = run / CHECKPOINTS / name
            if folder.exists():  # never named the latest, so not known to be whole
                discard(folder)
            say(f"fetching {shown(self.url)}/{name}")
            with staged_folder(folder) as staging:
                for file, digest in digests.items():
                    self._try(
                        f"read {name}/{file}",
                        lambda f=file, d=digest: self._compare(f"{name}/{f}", d, staging / f),
                    )
                (staging / META).write_bytes(data)
        except (_Damaged, ValueError, AttributeError) as error:
            say(
                f"WARNING: the copy {shown(self.url)}/{name} is not whole ({error}); looking for an older one"
            )
            return None
        write_text(run / CHECKPOINTS / LATEST, name + "\n")
        return folder

    def _put(self, file: Path, name: str, digest: str) -> None:
        self._make_parent(name)
        self._fs.put_file(str(file), f"{self._root}/{name}")
        self._compare(name, digest)

    def _compare(self, name: str, digest: str, into: Path | None = None) -> None:
        """Read a file, into another if wanted, and compare its hash."""
        found = hashlib.sha256()
        self._fs.invalidate_cache()
        with ExitStack() as stack:
            try:
                source = stack.enter_context(self._fs.open(f"{self._root}/{name}", "rb"))
            except FileNotFoundError as error:
                raise _Damaged(f"{name} is not there") from error
            target = stack.enter_context(into.open("wb")) if into else None
            while block := source.read(_BLOCK):
                found.update(block)
                if target is not None:
                    target.write(block)
        if found.hexdigest() != digest:
            raise _Damaged(f"{name} came back with other bytes")

    def _names(self) -> list[str]:
        """Checkpoints that are there by name or by list, newest first.

        Either may be out of date.
        """
        data = self._read(LATEST)
        names = {*self._listed(), data.decode(errors="replace").strip() if data else ""}
        return sorted((name for name in names if _NAME.fullmatch(name)), reverse=True)

    def _listed(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            return [
                str(path).rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)
            ]
        except FileNotFoundError:
            return []

    def _prune(self, latest: str) -> None:
        names = [name for name in sorted(self._listed()) if _NAME.fullmatch(name)]
        older = [name for name in names if name < latest]
        for name in {*names} - {latest, *older[max(len(older) - (self.keep - 1), 0) :]}:
            self._remove(f"{name}/{META}")
            with suppress(FileNotFoundError):
                self._fs.rm(f"{self._root}/{name}", recursive=True)

    def _has(self, folder: Path) -> bool:
        return self._try("read", lambda: self._read(f"{folder.name}/{META}")) == (folder / META).read_bytes()

    def _read(self, name: str) -> bytes | None:
        try:
            return self._fs.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return None

    def _write(self, name: str, data: bytes) -> None:
        """Write a small file atomically: object stores write at once, other systems rename."""
        path = f"{self._root}/{name}"
        if self._fs.async_impl:
            self._fs.pipe_file(path, data)
        else:
            self._make_parent(name)
            self._fs.pipe_file(f"{path}.incomplete", data)
            self._fs.mv(f"{path}.incomplete", path)
        if self._read(name) != data:
            raise _Damaged(f"{name} came back with other bytes")

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    def _make_parent(self, name: str) -> None:
        """Disks and the like need folders.

        Object stores (which are asynchronous in fsspec) would make a bucket.
        """
        if not self._fs.async_impl:
            self._fs.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)

    def _try(self, what: str, once: Callable[[], _T]) -> _T:
        """Call `once` until it returns, with growing waits.

        Raises:
            OutputError: it failed each time, or in a way that does not pass.
            _Damaged: other bytes came each time.
        """
        tries = 0
        while True:
            try:
                return once()
            except Exception as error:
                tries += 1
                passing = not isinstance(error, PermissionError | NotImplementedError)
                if tries <= len(WAITS) and passing and not self.stopping():
                    time.sleep(WAITS[tries - 1] * (0.5 + random.random()))
                    continue
                if isinstance(error, _Damaged):
                    raise
                reason = (
                    " ".join(str(error).replace(self.url, shown(self.url)).split()) or type(error).__name__
                )
                raise OutputError(
                    f"could not {what} at {shown(self.url)} ({reason}) in {tries} tries; check the address and your access"
                ) from error

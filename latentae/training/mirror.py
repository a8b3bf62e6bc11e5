"""Copies of checkpoints on another file system, in case a machine or disk is lost.

URL/latentae.json       the job of the copies
URL/latest              the name of the newest complete copy
URL/step-00001000/      the files of a checkpoint; meta.json, with all SHA-256, is written last

Object stores have no rename, and their listings can be out of date. So each file is read back after
it was written, and a copy is used only if all its hashes match.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from latentae.data.sources import shown
from latentae.errors import MissingDependencyError, OutputError
from latentae.file_names import RECORD
from latentae.files import json_bytes, read_json, staged_folder, write_text
from latentae.jobs import first_difference
from latentae.models.pretrained import CHECKPOINTS, LATEST, META
from latentae.progress import say
from latentae.training.checkpoint import check_meta, discard, find_checkpoint, newest
from latentae.training.claim import CLAIM

__all__ = ["Mirror", "UrlPlace"]

WAITS = (1.0, 5.0, 20.0, 60.0)  # seconds before each retry
_T = TypeVar("_T")
_NAME = re.compile(r"step-\d{8,}")
_BLOCK = 1 << 23


class _Damaged(Exception):
    """A file differs from what was written."""


class UrlPlace:
    """A claim at a mirror's URL (a `ClaimPlace`)."""

    def __init__(self, mirror: Mirror) -> None:
        self.name, self._mirror = shown(mirror.url), mirror

    def read(self) -> bytes | None:
        """The existing claim."""
        return self._mirror._try("read the claim", lambda: self._mirror._read(CLAIM))

    def write(self, data: bytes) -> None:
        """Replace the claim."""
        self._mirror._try("write the claim", lambda: self._mirror._write(CLAIM, data))

    def remove(self) -> None:
        """Remove the claim."""
        self._mirror._remove(CLAIM)

    def alone(self) -> None:
        """None: object stores have no locks."""


class Mirror:
    """Copies the checkpoints of a run to a URL, and finds them again.

    Only the first process has one. A failure during the run is logged and counted, because the
    checkpoint on the disk is complete. A failure at the start is an error: the URL may be wrong.

    Args:
        url: a folder on any fsspec file system.
        inputs: identity of the job, as plain JSON values.
        keep: newest copies to keep.
        stopping: whether the run is about to stop; then nothing is retried.

    Attributes:
        failures: checkpoints that could not be copied.

    Raises:
        MissingDependencyError: the file system needs a package that is not installed.
        OutputError: fsspec does not know the URL.
    """

    def __init__(
        self, url: str, inputs: Mapping[str, Any], keep: int, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self.url, self.inputs, self.keep = url.rstrip("/"), dict(inputs), keep
        self.stopping, self.failures = stopping, 0
        try:
            from fsspec.core import url_to_fs

            self._fs, root = url_to_fs(self.url)
        except ImportError as error:
            message = f"checkpoint_url {shown(url)}: {error}; install it and try again"
            raise MissingDependencyError(message) from error
        except ValueError as error:
            message = f"checkpoint_url {shown(url)} can't be opened ({error}); use a scheme that fsspec knows"
            raise OutputError(message) from error
        self._root = root.rstrip("/")

    def claim(self) -> None:
        """Record this job at the URL, or check that the URL has the same job.

        Raises:
            OutputError: it has another job, or can't be read and written.
        """
        found = self._try(f"read {RECORD}", lambda: self._read(RECORD))
        if found is None:
            record = {"format_version": 1, "verb": "train", "inputs": self.inputs}
            data = json_bytes(record)
            self._try(f"write {RECORD}", lambda: self._write(RECORD, data))
            return
        try:
            inputs = json.loads(found)["inputs"]
        except (ValueError, KeyError, TypeError) as error:
            message = f"{shown(self.url)}/{RECORD} is damaged or not ours ({error}); choose another address"
            raise OutputError(message) from error
        self._refuse_another(inputs)

    def _refuse_another(self, inputs: Any) -> None:
        difference = first_difference(inputs, self.inputs)
        if difference:
            found = f"{shown(self.url)} holds checkpoints of another run: {difference}"
            raise OutputError(f"{found}; choose another --checkpoint-url")

    def newest(self, run: Path) -> Path | None:
        """The newest complete checkpoint of the run, on the disk or at the URL.

        It is downloaded if only the URL has it, and copied if only the disk has it.

        Raises:
            OutputError: the URL can't be read or has another job, or the disk is full.
            TrainingError: the newest copy has a newer format.
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
        """Copy a checkpoint and read it back, then name it the latest and remove the oldest copies.

        Returns:
            Whether it was copied. A failure is logged and does not stop the run.
        """
        name, meta = folder.name, f"{folder.name}/{META}"
        try:
            digests = check_meta(read_json(folder / META), str(folder))
            self._try("begin", lambda: self._remove(meta))  # a copy of an earlier attempt is incomplete now
            for file, digest in digests.items():
                put = partial(self._put, folder / file, f"{name}/{file}", digest)
                self._try(f"copy {file}", put)
            self._try(f"copy {META}", lambda: self._write(meta, (folder / META).read_bytes()))
            self._try(f"write {LATEST}", lambda: self._write(LATEST, f"{name}\n".encode()))
        except (OutputError, _Damaged) as error:
            self.failures += 1
            say(
                f"WARNING: {name} was not copied: {error}; continuing with {folder} "
                f"({self.failures} not copied so far)"
            )
            return False
        try:
            self._try("remove old copies", lambda: self._prune(name))
        except OutputError as error:
            say(f"WARNING: {error}; retrying after the next checkpoint")
        return True

    def _fetch(self, name: str, run: Path) -> Path | None:
        """Download a copy as the run's latest checkpoint; None if it is incomplete."""
        where = f"{shown(self.url)}/{name}"
        try:
            data = self._try(f"read {name}/{META}", lambda: self._read(f"{name}/{META}"))
            if data is None:
                raise _Damaged(f"it has no {META}")
            meta = json.loads(data)
            self._refuse_another(meta.get("inputs"))
            digests = check_meta(meta, where)
            folder = run / CHECKPOINTS / name
            if folder.exists():  # never named the latest, so it may be incomplete
                discard(folder)
            say(f"fetching {where}")
            with staged_folder(folder) as staging:
                for file, digest in digests.items():
                    get = partial(self._compare, f"{name}/{file}", digest, staging / file)
                    self._try(f"read {name}/{file}", get)
                (staging / META).write_bytes(data)
        except (_Damaged, ValueError, AttributeError) as error:
            say(f"WARNING: the copy {where} is incomplete ({error}); trying an older one")
            return None
        write_text(run / CHECKPOINTS / LATEST, name + "\n")
        return folder

    def _put(self, file: Path, name: str, digest: str) -> None:
        self._make_parent(name)
        self._fs.put_file(str(file), f"{self._root}/{name}")
        self._compare(name, digest)

    def _compare(self, name: str, digest: str, into: Path | None = None) -> None:
        """Read a file, optionally into another, and compare its hash."""
        found = hashlib.sha256()
        self._fs.invalidate_cache()
        with ExitStack() as stack:
            try:
                source = stack.enter_context(self._fs.open(f"{self._root}/{name}", "rb"))
            except FileNotFoundError as error:
                raise _Damaged(f"{name} is missing") from error
            target = stack.enter_context(into.open("wb")) if into else None
            while block := source.read(_BLOCK):
                found.update(block)
                if target is not None:
                    target.write(block)
        if found.hexdigest() != digest:
            raise _Damaged(f"{name} came back with other bytes")

    def _names(self) -> list[str]:
        """Names of copies, newest first, from `latest` and the listing."""
        data = self._read(LATEST)
        named = data.decode(errors="replace").strip() if data else ""
        names = {*self._listed(), named} if _NAME.fullmatch(named) else self._listed()
        return sorted(names, reverse=True)

    def _listed(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            paths = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        names = (str(path).rstrip("/").rpartition("/")[2] for path in paths)
        return [name for name in names if _NAME.fullmatch(name)]

    def _prune(self, latest: str) -> None:
        names = self._listed()
        for name in {*names} - newest(names, latest, self.keep):
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
        """Create the folder of a file, but not on object stores: these would create a bucket."""
        if not self._fs.async_impl:
            self._fs.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)

    def _try(self, what: str, once: Callable[[], _T]) -> _T:
        """Call `once`, and retry with growing waits.

        Raises:
            OutputError: every try failed, or a retry can't help.
            _Damaged: every try found other bytes.
        """
        for tries in count(1):
            try:
                return once()
            except Exception as error:
                permanent = isinstance(error, PermissionError | NotImplementedError)
                if tries <= len(WAITS) and not permanent and not self.stopping():
                    time.sleep(WAITS[tries - 1] * (0.5 + random.random()))
                    continue
                if isinstance(error, _Damaged):
                    raise
                reason = " ".join(str(error).replace(self.url, shown(self.url)).split())
                raise OutputError(
                    f"could not {what} at {shown(self.url)} ({reason or type(error).__name__}) "
                    f"in {tries} tries; check the address and your access"
                ) from error
        raise AssertionError("unreachable")

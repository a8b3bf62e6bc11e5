"""The files of a trainer's layout: written to a temporary folder shard by shard, then published."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor

from latentae import keyed
from latentae.encoding.latent_dataset import LatentDataset
from latentae.errors import OutputError
from latentae.files import write_advice
from latentae.progress import Progress

__all__ = ["Layout", "draw", "npy", "npz", "remove_staging"]

_STAGING = "layout.incomplete"  # Job.open ignores this name


class Layout:
    """A trainer's layout that is being written.

    Args:
        out: folder of the job.
        dataset: the latents.
        name: of the format, for messages.
    """

    def __init__(self, out: Path, dataset: LatentDataset, name: str) -> None:
        self._out, self._dataset, self._name = out, dataset, name
        self._staging, self._done = out / _STAGING / "files", out / _STAGING / "done"
        with self._errors():
            for folder in (self._staging, self._done):
                folder.mkdir(parents=True, exist_ok=True)

    def shards(self) -> Iterator[range]:
        """The sample indices of each shard not yet written. The next request marks it written."""
        ranges = self._dataset.shard_ranges
        marks = [self._done / str(number) for number in range(len(ranges))]
        todo = [(rows, mark) for rows, mark in zip(ranges, marks, strict=True) if not mark.exists()]
        total = len(self._dataset)
        done = total - sum(len(rows) for rows, _ in todo)
        with Progress(f"writing {self._name}", total=total, initial=done) as progress:
            for rows, mark in todo:
                yield rows
                with self._errors():
                    _flush()  # the shard's files must be on the disk before its mark
                    mark.touch()
                progress.advance(len(rows))

    def samples(self, *, resume: bool = True) -> Iterator[int]:
        """The sample indices of all shards not yet written, or of all shards without `resume`."""
        if resume:
            for rows in self.shards():
                yield from rows
            return
        with Progress(f"writing {self._name}", total=len(self._dataset)) as progress:
            for index in range(len(self._dataset)):
                yield index
                progress.advance(1)

    def put(self, name: str, data: bytes) -> None:
        """Write a file. It becomes visible when the layout is published."""
        with self._errors():
            path = self._staging / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def put_zip(self, name: str, files: Iterable[tuple[str, bytes]]) -> None:
        """Write a zip of files, uncompressed and without times."""
        with self._errors():
            _write_zip(self._staging / name, files)

    @property
    def built(self) -> bool:
        """Whether all files are written, but maybe not all published."""
        return (self._done / "all").exists()

    def publish(self) -> None:
        """Move all files to their final names, each in one step. Resumes after an interruption."""
        with self._errors():
            _flush()
            (self._done / "all").touch()
            for entry in sorted(self._staging.iterdir()):
                entry.replace(self._out / entry.name)
            _flush()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Report a failed write as one line."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"could not write {self._out}: {error.strerror or error}; {write_advice(error.errno)}; the "
                "same command resumes"
            ) from error


def remove_staging(out: Path) -> None:
    """Remove the temporary folder of a finished job."""
    shutil.rmtree(out / _STAGING, ignore_errors=True)


def _flush() -> None:
    """Flush all writes to the disk; one call for thousands of small files."""
    if hasattr(os, "sync"):  # not on Windows
        os.sync()


def draw(dataset: LatentDataset, index: int, seed: int, *, flip: bool = False) -> Tensor:
    """A sample mean + sigma * eps [z, h, w], fp32, raw, with eps keyed by (seed, index, flip)."""
    latent = dataset.posterior(index, flip=flip)
    return latent.sample(keyed.generator("format", seed, index, int(flip)))


def npy(array: np.ndarray) -> bytes:
    """The bytes of an npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of an npz file without times."""
    file = io.BytesIO()
    _write_zip(file, ((f"{name}.npy", npy(array)) for name, array in arrays.items()))
    return file.getvalue()


def _write_zip(file: Path | io.BytesIO, files: Iterable[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files:
            archive.writestr(zipfile.ZipInfo(name), data)

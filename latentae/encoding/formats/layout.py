"""What the writers share: a folder that is filled out of sight, shard by shard, and the checks that most of them make."""

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
from latentae.encoding.latents import LatentDataset
from latentae.errors import DataError, OutputError
from latentae.files import write_advice
from latentae.progress import Progress

__all__ = [
    "Layout",
    "draw",
    "npy",
    "npz",
    "remove_staging",
    "require_flips",
    "require_labels",
    "require_one_size",
]

_STAGING = "layout.incomplete"  # a name that Job.open and readers of the folder pass over
_DONE, _BUILT = "done", "all"


class Layout:
    """The files of a trainer's layout on their way.

    Args:
        out: the folder of the job.
        dataset: what is written.
        name: of the format, for messages.
    """

    def __init__(self, out: Path, dataset: LatentDataset, name: str) -> None:
        self._out, self._dataset, self._name = out, dataset, name
        self._staging, self._done = out / _STAGING / "files", out / _STAGING / _DONE
        with self._errors():
            for folder in (self._staging, self._done):
                folder.mkdir(parents=True, exist_ok=True)

    def shards(self) -> Iterator[range]:
        """The indices of each shard that is not written yet; it counts as written when the next one is asked for."""
        ranges = self._dataset.shard_ranges
        marks = [self._done / str(number) for number in range(len(ranges))]
        done = sum(len(rows) for rows, mark in zip(ranges, marks, strict=True) if mark.exists())
        with Progress(f"writing {self._name}", total=len(self._dataset), initial=done) as progress:
            for rows, mark in zip(ranges, marks, strict=True):
                if mark.exists():
                    continue
                yield rows
                with self._errors():
                    _flush()  # what the mark vouches for is on the disk before it
                    mark.touch()
                progress.advance(len(rows))

    def put(self, name: str, data: bytes) -> None:
        """Write a file; only once the layout is published does anyone see it."""
        with self._errors():
            path = self._staging / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def put_zip(self, name: str, files: Iterable[tuple[str, bytes]]) -> None:
        """Write a file that is a zip of others, stored as they are, without a time in it."""
        with self._errors(), zipfile.ZipFile(self._staging / name, "w", zipfile.ZIP_STORED) as archive:
            for inside, data in files:
                archive.writestr(zipfile.ZipInfo(inside), data)

    def samples(self) -> Iterator[int]:
        """All indices, for a layout that is one file."""
        with Progress(f"writing {self._name}", total=len(self._dataset)) as progress:
            for index in range(len(self._dataset)):
                yield index
                progress.advance(1)

    @property
    def built(self) -> bool:
        """Whether every file is there, if not all have their names yet."""
        return (self._done / _BUILT).exists()

    def publish(self) -> None:
        """Give everything its name. Killed half-way, it goes on with what is left: an entry is moved in one step."""
        with self._errors():
            _flush()
            (self._done / _BUILT).touch()
            for entry in sorted(self._staging.iterdir()):
                entry.replace(self._out / entry.name)
            _flush()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """A failed write as one line."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"could not write {self._out}: {error.strerror or error}; {write_advice(error.errno)}; the same command resumes"
            ) from error


def remove_staging(out: Path) -> None:
    """Once the job is finished: what it took to get there."""
    shutil.rmtree(out / _STAGING, ignore_errors=True)


def _flush() -> None:
    """Everything written so far to the disk: one call for thousands of small files."""
    if hasattr(os, "sync"):  # not on Windows
        os.sync()


def draw(dataset: LatentDataset, index: int, seed: int, *, flip: bool = False) -> Tensor:
    """A sample z = mean + sigma * eps [z, h, w] fp32, raw, with eps keyed by (seed, index, flip)."""
    latent = dataset.posterior(index, flip=flip)
    generator = keyed.generator("format", seed, index, int(flip))
    return latent.sample(generator)


def npy(array: np.ndarray) -> bytes:
    """The bytes of an npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of an npz file, without a time in them."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), npy(array))
    return file.getvalue()


def require_one_size(dataset: LatentDataset, name: str) -> tuple[int, int]:
    """Height and width in pixels of all images; OutputError where there is more than one, or no latent at all."""
    sizes = sorted({(int(height), int(width)) for height, width in np.unique(dataset.sizes, axis=0)})
    if len(sizes) != 1:
        found = ", ".join(f"{height}x{width}" for height, width in sizes[:4]) or "no latents"
        raise OutputError(
            f"{name} takes latents of one size, found {found}; encode with --resolution and without --buckets"
        )
    return sizes[0]


def require_flips(dataset: LatentDataset, name: str) -> None:
    """OutputError where the mirrored images were not encoded."""
    if not dataset.flips:
        raise OutputError(
            f"{name} reads latents of mirrored images too, and none are stored; encode again with --flip"
        )


def require_labels(dataset: LatentDataset, name: str) -> None:
    """DataError where a sample has no class label."""
    missing = np.flatnonzero(dataset.labels < 0)
    if len(missing):
        raise DataError(
            f"{name} needs a class label for each sample; {len(missing)} of {len(dataset)} have none, the first is "
            f'{dataset.keys[int(missing[0])]!r}; give each a `cls` member, or a `json` with a whole number as "label"'
        )

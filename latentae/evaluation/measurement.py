"""Measurements of images: rows of numbers and sums, stored per chunk and merged in order.

The chunks depend only on the number of images. One process, several processes and a resumed
evaluation therefore give the same numbers.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from latentae.errors import ImageError, OutputError
from latentae.files import atomic_file
from latentae.measures.frechet import frechet_distance, split_moments
from latentae.measures.latents.probe import probe_report
from latentae.measures.latents.report import LatentReport
from latentae.measures.scores import Scores
from latentae.models.latent_statistics import Moments

__all__ = ["MODEL", "ORIGINALS", "QUANTIZED", "ChunkFiles", "Measurement", "chunks_of", "merge", "spread"]

MODEL, QUANTIZED = "model", "latent_8bit"
ORIGINALS = "originals"  # the images themselves, as a key of `features`
MOST_CHUNKS, CHUNK_MULTIPLE = 32, 16


@dataclass
class Measurement:
    """Everything measured on some images, in their order.

    Attributes:
        positions: of the images in the shards, without unreadable images.
        keys: printable keys.
        labels: of the images, "" for an image without a label.
        scores: by method.
        features: fp32 [n, d] arrays by method, for the Frechet distance; NaN where a method has no
            result.
        moments: of the features of the chunks added so far, by method.
        halves: moments of the originals' features in two halves, chosen by key.
        pooled: fp32 [n, p] arrays of pooled latents for the linear probe, of the images with a
            label.
        latents: sums over the latents.
        latent_shape: z, h, w.
        skipped: (key, reason) of images that could not be read.
        counts: number of "enlarged", "gray" and "deep" images.
    """

    positions: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    scores: dict[str, Scores] = field(default_factory=dict)
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    halves: tuple[Moments, Moments] | None = None
    pooled: list[np.ndarray] = field(default_factory=list)
    latents: LatentReport = field(default_factory=LatentReport)
    latent_shape: tuple[int, ...] = ()
    skipped: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, chunk: Measurement) -> None:
        """Merge the next chunk into this measurement, and reduce its features to moments."""
        for name in ("positions", "keys", "labels", "pooled", "skipped"):
            getattr(self, name).extend(getattr(chunk, name))
        self.counts.update(chunk.counts)
        self.latent_shape = chunk.latent_shape or self.latent_shape
        self.latents = self.latents.merge(chunk.latents)
        for method, scores in chunk.scores.items():
            for metric, values in scores.values.items():
                self.scores.setdefault(method, Scores()).add(metric, values)
        for method in chunk.features:
            rows = chunk.feature_rows(method)
            if method == ORIGINALS:
                first, second = split_moments(chunk.keys, rows)
                before = self.halves
                self.halves = (before[0].merge(first), before[1].merge(second)) if before else (first, second)
            else:
                found = Moments.of(rows[np.isfinite(rows).all(axis=1)])
                self.moments[method] = self.moments[method].merge(found) if method in self.moments else found

    def feature_rows(self, method: str) -> np.ndarray:
        """Features of a method, fp32 [n, d]."""
        return np.concatenate(self.features[method])

    def frechet(self) -> dict[str, float]:
        """Frechet distance from the originals, of each method that has a result for every image."""
        if self.halves is None or len(self.keys) < 2:
            return {}
        originals = self.halves[0].merge(self.halves[1])
        complete = {name: found for name, found in self.moments.items() if found.count == originals.count}
        return {name: frechet_distance(found, originals) for name, found in complete.items()}

    def probe(self) -> dict[str, Any]:
        """Report of the linear probe on the labeled images."""
        labeled = [(key, label) for key, label in zip(self.keys, self.labels, strict=True) if label]
        if not labeled:
            return {"skipped": "the samples have no labels (a member .cls)"}
        keys, labels = zip(*labeled, strict=True)
        return probe_report(keys, labels, torch.from_numpy(np.concatenate(self.pooled)))

    def save(self, path: Path) -> None:
        """Write the rows and sums of one chunk as arrays, atomically."""
        facts = {
            "keys": self.keys,
            "labels": self.labels,
            "latent_shape": self.latent_shape,
            "skipped": self.skipped,
            "counts": self.counts,
            "metrics": {method: list(scores.values) for method, scores in self.scores.items()},
            "features": list(self.features),
        }
        arrays = {
            "positions": np.array(self.positions, dtype=np.int64),
            "facts": np.array(json.dumps(facts)),
            **{
                f"score/{method}/{metric}": np.array(values)
                for method, scores in self.scores.items()
                for metric, values in scores.values.items()
            },
            **{f"feature/{method}": self.feature_rows(method) for method in self.features},
            **({"pooled": np.concatenate(self.pooled)} if self.pooled else {}),
            **{f"latents/{name}": value for name, value in self.latents.to_arrays().items()},
        }
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]

    @classmethod
    def load(cls, path: Path) -> Measurement:
        """Read the file that `save` wrote.

        Raises:
            OutputError: the file is damaged.
        """
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            facts = json.loads(str(arrays["facts"]))
            latents = {
                name.removeprefix("latents/"): value
                for name, value in arrays.items()
                if name.startswith("latents/")
            }
            return cls(
                positions=arrays["positions"].tolist(),
                keys=facts["keys"],
                labels=facts["labels"],
                scores={
                    method: Scores(
                        {metric: arrays[f"score/{method}/{metric}"].tolist() for metric in metrics}
                    )
                    for method, metrics in facts["metrics"].items()
                },
                features={method: [arrays[f"feature/{method}"]] for method in facts["features"]},
                pooled=[arrays["pooled"]] if "pooled" in arrays else [],
                latents=LatentReport.from_arrays(latents),
                latent_shape=tuple(facts["latent_shape"]),
                skipped=[(key, reason) for key, reason in facts["skipped"]],
                counts=Counter(facts["counts"]),
            )
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise OutputError(
                f"{path} is damaged ({error}); remove it and run the same command again"
            ) from error


def merge(chunks: Iterable[Measurement]) -> Measurement:
    """Merge chunks in their order; only one is in memory at a time, apart from its rows of numbers.

    Raises:
        ImageError: no image could be read.
    """
    total = Measurement()
    for chunk in chunks:
        total.add(chunk)
    if not total.keys:
        first = f"; the first: {total.skipped[0][1]}" if total.skipped else ""
        raise ImageError(f"none of {len(total.skipped)} images can be evaluated{first}")
    return total


def chunks_of(total: int) -> list[range]:
    """Positions 0 to `total` in at most 32 chunks of a multiple of 16, except for the last."""
    size = CHUNK_MULTIPLE * max(-(-total // (MOST_CHUNKS * CHUNK_MULTIPLE)), 1)
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` positions spread evenly over `count` images, including the first and the last."""
    wanted = min(wanted, count)
    return [round(index * (count - 1) / max(wanted - 1, 1)) for index in range(wanted)]


class ChunkFiles:
    """Folder with one file per measured chunk of an evaluation.

    Args:
        folder: created if missing.
        total: number of images.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.chunks = folder, chunks_of(total)
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, number: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"{number:03}.npz"

    def share(self, task: int, tasks: int) -> list[int]:
        """Chunks that process `task` of `tasks` still has to measure."""
        return [number for number in range(task, len(self.chunks), tasks) if not self.path(number).is_file()]

    def complete(self) -> bool:
        """Whether every chunk is measured."""
        return not self.share(0, 1)

    def merged(self) -> Measurement:
        """All chunks, merged in order."""
        return merge(Measurement.load(self.path(number)) for number in range(len(self.chunks)))

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Whether this process may write the results.

        The system releases the lock of a crashed process.

        False also if another process has written the results and removed the folder.
        """
        lock = FileLock(self.folder / "lock")
        try:
            if not self.folder.is_dir():  # FileLock would create it
                raise FileNotFoundError
            lock.acquire(blocking=False)
        except (Timeout, FileNotFoundError):
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

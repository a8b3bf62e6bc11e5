"""What one chunk of an evaluation gives: rows of numbers, features and sums, as one file of plain arrays."""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from latentae.errors import OutputError
from latentae.files import atomic_file
from latentae.measures.latents.report import LatentReport
from latentae.measures.scores import Scores

__all__ = ["ORIGINALS", "Part"]

ORIGINALS = "originals"  # among the features: the images themselves


@dataclass
class Part:
    """Everything measured on some images, in their order.

    Attributes:
        positions: of the images in the shards; those that could not be read are not among them.
        keys: printable keys.
        labels: of the images, "" where there is none.
        scores: by method.
        features: fp32 [n, d] by method, for the Frechet distance; NaN where a method has no result.
        pooled: fp32 [n, p], of the latents, for the linear probe; empty where no image has a label.
        latents: sums over the latents.
        latent_shape: z, h, w.
        skipped: (key, reason) of images that could not be read.
        counts: "enlarged", "gray" and "deep" images.
    """

    positions: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    scores: dict[str, Scores] = field(default_factory=dict)
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)
    pooled: list[np.ndarray] = field(default_factory=list)
    latents: LatentReport = field(default_factory=LatentReport)
    latent_shape: tuple[int, ...] = ()
    skipped: list[tuple[str, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def feature_rows(self, method: str) -> np.ndarray:
        """fp32 [n, d]."""
        return np.concatenate(self.features[method])

    def save(self, path: Path) -> None:
        """Write the part whole or not at all."""
        facts = {
            "keys": self.keys,
            "labels": self.labels,
            "latent_shape": self.latent_shape,
            "skipped": self.skipped,
            "counts": self.counts,
            "metrics": {method: list(scores.values) for method, scores in self.scores.items()},
            "features": list(self.features),
        }
        arrays: dict[str, Any] = {
            "positions": np.array(self.positions, dtype=np.int64),
            "facts": np.array(json.dumps(facts)),
        }
        for method, scores in self.scores.items():
            arrays |= {
                f"score/{method}/{metric}": np.array(values) for metric, values in scores.values.items()
            }
        arrays |= {f"feature/{method}": self.feature_rows(method) for method in self.features}
        if self.pooled:
            arrays["pooled"] = np.concatenate(self.pooled)
        arrays |= {f"latents/{name}": value for name, value in self.latents.to_arrays().items()}
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Part:
        """Read what `save` wrote; OutputError where it is damaged."""
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            facts = json.loads(str(arrays["facts"]))
            scores = {
                method: Scores({metric: arrays[f"score/{method}/{metric}"].tolist() for metric in metrics})
                for method, metrics in facts["metrics"].items()
            }
            return cls(
                positions=arrays["positions"].tolist(),
                keys=facts["keys"],
                labels=facts["labels"],
                scores=scores,
                features={method: [arrays[f"feature/{method}"]] for method in facts["features"]},
                pooled=[arrays["pooled"]] if "pooled" in arrays else [],
                latents=LatentReport.from_arrays(
                    {
                        name.removeprefix("latents/"): value
                        for name, value in arrays.items()
                        if name.startswith("latents/")
                    }
                ),
                latent_shape=tuple(facts["latent_shape"]),
                skipped=[(key, reason) for key, reason in facts["skipped"]],
                counts=facts["counts"],
            )
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise OutputError(
                f"{path} is damaged ({error}); remove it and give the same command again"
            ) from error

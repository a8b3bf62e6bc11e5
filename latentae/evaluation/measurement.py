"""All chunks of an evaluation together: rows joined, sums merged, in the order of the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from latentae.errors import ImageError
from latentae.evaluation.part import ORIGINALS, Part
from latentae.measures.frechet import Moments, SplitMoments, frechet_distance
from latentae.measures.latents.probe import probe_report
from latentae.measures.latents.report import LatentReport
from latentae.measures.scores import Scores

__all__ = ["Measurement", "join"]

NO_LABELS = "the samples have no labels (a member .cls)"


@dataclass
class Measurement:
    """Everything the pass over the images gave.

    Attributes:
        positions, keys: of the images, in order.
        scores: by method; rows in the order of `keys`.
        latents: sums over all latents.
        latent_shape: z, h, w.
        moments: of the features by method; a method that lacks images has none.
        originals: of the features of the images themselves, in two halves; None without features.
        probe: the report of the linear probe.
        skipped: (key, reason) of images that could not be read.
        counts: "enlarged", "gray" and "deep" images.
    """

    positions: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    scores: dict[str, Scores] = field(default_factory=dict)
    latents: LatentReport = field(default_factory=LatentReport)
    latent_shape: tuple[int, ...] = ()
    moments: dict[str, Moments] = field(default_factory=dict)
    originals: SplitMoments | None = None
    probe: dict[str, Any] = field(default_factory=lambda: {"skipped": NO_LABELS})
    skipped: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def frechet(self) -> dict[str, float]:
        """Distance of each method's images from the originals; those that have a result for every image."""
        reference = None if self.originals is None else self.originals.whole
        if reference is None or reference.n < 2:
            return {}
        return {
            name: frechet_distance(found, reference)
            for name, found in self.moments.items()
            if found.n == reference.n
        }


def join(parts: Iterable[Part]) -> Measurement:
    """Merge chunks in their order; one is in memory at a time, but for its rows of numbers.

    Raises:
        ImageError: no image could be read.
    """
    total, labels, pooled = Measurement(), [], []
    for part in parts:
        total.skipped.extend(part.skipped)
        total.counts.update(part.counts)
        if not part.keys:
            continue
        total.positions.extend(part.positions)
        total.keys.extend(part.keys)
        total.latent_shape = part.latent_shape
        total.latents = total.latents.merge(part.latents)
        for method, scores in part.scores.items():
            joined = total.scores.setdefault(method, Scores())
            for metric, values in scores.values.items():
                joined.add(metric, values)
        _merge_features(total, part)
        pooled.extend(part.pooled)
        labels.extend((key, label) for key, label in zip(part.keys, part.labels, strict=True) if label)
    if not total.keys:
        first = f"; the first: {total.skipped[0][1]}" if total.skipped else ""
        raise ImageError(f"none of {len(total.skipped)} images can be evaluated{first}")
    if labels:
        keys, names = zip(*labels, strict=True)
        total.probe = probe_report(keys, names, torch.from_numpy(np.concatenate(pooled)))
    return total


def _merge_features(total: Measurement, part: Part) -> None:
    for method in part.features:
        rows = part.feature_rows(method)
        if method == ORIGINALS:
            halves = SplitMoments.of(part.keys, rows)
            total.originals = halves if total.originals is None else total.originals.merge(halves)
            continue
        moments = Moments.of(rows[np.isfinite(rows).all(axis=1)])
        total.moments[method] = total.moments[method].merge(moments) if method in total.moments else moments

"""The task `anomaly`: which images are unlike the normal ones, and where.

normal images   half by key: units of the scores, and the latent Gaussian; the other half: the threshold
inputs          scores.csv, one row an image; heat/, the highest-scoring ones: image, reconstruction, error
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentae.data.transforms import to_float, to_uint8
from latentae.errors import DataError, RecipeError
from latentae.files import read_json, write_json
from latentae.jobs import Job
from latentae.keyed import derive_seed
from latentae.measures.perceptual_distance import Distance, choose_distance
from latentae.measures.ranking import SAME, rank
from latentae.options import verb
from latentae.pages.images import image_grid, write_png
from latentae.progress import Progress, say
from latentae.tasks.inputs import Images, Labels, open_images, read_labels
from latentae.tasks.network import Batch, Network, batches
from latentae.tasks.normality import Gaussian, GaussianFit, auroc, conformal_threshold, error_map
from latentae.tasks.options import AnomalyOptions
from latentae.tasks.parts import Parts
from latentae.tasks.pictures import enlarge, heat_picture, rgb

__all__ = ["SCORES", "anomaly"]

SCORES = ("combined", "error", "peak", "latent", "perceptual")
TABLE, SUMMARY, NORMAL, HEAT = "scores.csv", "summary.json", "normal.json", "heat"
PART = 4096
_CALIBRATION = 0.5
_NAMED = 200  # bytes of a key in the name of its heat map, whose number keeps it apart
_COMBINED = ("error", "peak", "latent")
_BRIGHT = 2.0  # times the threshold of the peak is the brightest colour of a heat map


@verb(AnomalyOptions)
def anomaly(options: AnomalyOptions) -> dict[str, Any]:
    """Score how unlike normal images each image is, with a threshold that `quantile` of normal images stay below.

    OUT gets scores.csv (a row an image, in their order), heat/ (image, reconstruction and error of those that score highest) and
    summary.json. Where both the normal images and the inputs have labels, an image whose label no normal one has is an anomaly,
    and the summary has the area under the ROC curve of each score. `latentae.tasks.normality` defines the scores.

    Returns:
        What summary.json holds.

    Raises:
        LatentAEError: the model, the images, an option or the output folder can't be used, or there are too few normal images.
    """
    if not 0 < options.quantile < 1 or options.score not in SCORES or options.heat_maps < 0:
        raise RecipeError(
            f"quantile is {options.quantile:g}, score {options.score!r} and heat_maps {options.heat_maps}; "
            f"expected 0 < quantile < 1, one of {', '.join(SCORES)}, "
            "and 0 or more"
        )
    network = Network(options.model, options.weights, options.device, reconstructs=True)
    network.check(options.resolution, options.batch_size)
    distance = _perceptual(options.perceptual, network, options.resolution, options.score)
    normals, images = (
        open_images(options.normal, "normal images", options.max_pixels),
        open_images(options.inputs, max_pixels=options.max_pixels),
    )
    label_of, label_kind = read_labels(options.labels)
    facts = {
        "model": network.fingerprint,
        "normal": normals.digest,
        "inputs": images.digest,
        "labels": label_kind,
    }
    choices = {
        "quantile": options.quantile,
        "score": options.score,
        "perceptual": distance.name,
        "heat_maps": options.heat_maps,
        "seed": options.seed,
    }
    job = Job.open(options.out, "anomaly", {**facts, **choices, "resolution": options.resolution})
    if job.state == "finished":
        say(f"{options.out} already holds these scores; see {job.folder / SUMMARY}")
        return read_json(job.folder / SUMMARY)
    work = _Detection(network, label_of, distance, options.resolution, options.batch_size)
    normality = work.normality(normals, job.folder / NORMAL, options.seed, options.quantile)
    parts = Parts(job.folder, images.count, PART)
    with Progress("anomaly: scoring", images.count) as progress:
        for part, numbers in parts.todo(progress):
            parts.done(part, work.score(images, numbers, normality, options.score, progress))
    columns = ["key", "label", "score", "anomalous", *normality.units, "combined"]
    parts.write_table(job.folder / TABLE, columns)
    result = _summary(parts, normality, options.score, options.quantile)
    work.draw(images, _highest(parts, options.heat_maps), normality, job.folder / HEAT)
    write_json(job.folder / SUMMARY, result)
    job.finish(images=images.count)
    parts.clear()
    _tell(result, job.folder)
    return result


def _perceptual(name: str, network: Network, resolution: int | None, score: str) -> Distance:
    if name == "none":
        if score == "perceptual":
            raise RecipeError("score is 'perceptual', but perceptual is 'none'; name a network, or give auto")
        return choose_distance("none", 0)
    if network.channels != 3 or resolution is None:
        raise RecipeError(
            f"a perceptual distance needs a resolution and 3 channels, got {resolution} and {network.channels}"
        )
    distance = choose_distance(name, resolution, network.device)
    if distance.module is None and score == "perceptual":
        raise RecipeError(f"score is 'perceptual', but {distance.reason}; choose another score")
    return distance


@dataclass(frozen=True)
class _Normality:
    gaussian: Gaussian
    units: dict[str, float]
    """Mean of each score over the first half of the normal images."""
    thresholds: dict[str, float]
    """Of each score, on the other half."""
    images: tuple[int, int]
    """In each half."""
    labels: list[str]

    def combine(self, scores: dict[str, Tensor]) -> Tensor:
        """The combined index, 1 on average for normal images: [B]."""
        return torch.stack([scores[name] / self.units[name] for name in _COMBINED]).mean(dim=0)

    def to_json(self) -> dict[str, Any]:
        return {
            "gaussian": self.gaussian.to_json(),
            "units": self.units,
            "thresholds": self.thresholds,
            "images": list(self.images),
            "labels": self.labels,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> _Normality:
        gaussian, (first, second) = Gaussian.from_json(value["gaussian"]), value["images"]
        return cls(gaussian, value["units"], value["thresholds"], (first, second), value["labels"])


@dataclass(frozen=True)
class _Detection:
    network: Network
    labels: Labels
    distance: Distance
    resolution: int | None
    batch_size: int

    def normality(self, normals: Images, file: Path, seed: int, quantile: float) -> _Normality:
        """Measure normal images, or read what an earlier start of this job measured."""
        if file.is_file():
            return _Normality.from_json(read_json(file))

        def calibrates(key: str) -> bool:
            return derive_seed("calibration", seed, key) < _CALIBRATION * 2**64

        labels: set[str] = set()
        with Progress("anomaly: normal images", normals.count) as progress:
            gaussian, units, fitted = self._fit(normals, lambda key: not calibrates(key), labels, progress)
            found: dict[str, list[Tensor]] = {}
            normality = _Normality(gaussian, units, {}, (fitted, 0), [])
            for batch in self._batches(normals, range(normals.count), calibrates):
                scores = self._scores(batch, gaussian)
                for name, values in {**scores, "combined": normality.combine(scores)}.items():
                    found.setdefault(name, []).append(values)
                labels.update(item.label for item in batch.items if item.label is not None)
                progress.advance(len(batch.items))
        count = sum(map(len, found.get("combined", [])))
        # A little above the score of an image, so that rounding does not decide whether the same image among the inputs is anomalous.
        thresholds = {
            name: _rounded(conformal_threshold(torch.cat(values), quantile) * (1 + SAME))
            for name, values in found.items()
        }
        if not thresholds:
            conformal_threshold(torch.empty(0), quantile)
        normality = _Normality(gaussian, units, thresholds, (fitted, count), sorted(labels))
        write_json(file, normality.to_json())
        return normality

    def _fit(
        self, normals: Images, wanted: Callable[[str], bool], labels: set[str], progress: Progress
    ) -> tuple[Gaussian, dict[str, float], int]:
        fit = GaussianFit(self.network.config.latent_channels)
        sums: dict[str, float] = {}
        count = 0
        for batch in self._batches(normals, range(normals.count), wanted):
            scores, latents = self._image_scores(batch)
            fit.add(latents.transpose(0, 1).flatten(1).T)
            for name, values in scores.items():
                sums[name] = sums.get(name, 0.0) + float(values.sum())
            labels.update(item.label for item in batch.items if item.label is not None)
            count += len(batch.items)
            progress.advance(len(batch.items))
        gaussian = Gaussian.of(fit.moments())
        units = {name: _rounded(total / count) for name, total in sums.items()}
        if not all(value > 0 for value in units.values()):
            raise DataError(
                "the model gives the normal images back without any error, so errors tell nothing; use a smaller latent"
            )
        return gaussian, {**units, "latent": 1.0}, count

    def score(
        self, images: Images, numbers: Sequence[int], normality: _Normality, which: str, progress: Progress
    ) -> list[dict[str, Any]]:
        """The rows of the table for some images."""
        rows: list[dict[str, Any]] = []
        for batch in self._batches(images, numbers):
            scores = self._scores(batch, normality.gaussian)
            scores["combined"] = normality.combine(scores)
            for position, item in enumerate(batch.items):
                values = {name: _rounded(float(found[position])) for name, found in scores.items()}
                flagged = int(values[which] > normality.thresholds[which])
                rows.append(
                    {
                        "number": item.number,
                        "key": item.key,
                        "label": item.label,
                        "score": values[which],
                        "anomalous": flagged,
                        **values,
                    }
                )
            progress.advance(len(batch.items))
        return rows

    def draw(self, images: Images, numbers: list[int], normality: _Normality, folder: Path) -> None:
        """A picture for each image: itself, its reconstruction, and where they differ."""
        ranks = {number: rank for rank, number in enumerate(numbers, 1)}
        brightest = _BRIGHT * normality.thresholds["peak"]
        for batch in self._batches(images, sorted(numbers)):
            _, reconstructions = self.network.reconstruct(batch)
            maps = error_map(self.network.pixels(batch), reconstructions) / brightest
            for item, heat, result in zip(batch.items, maps, to_uint8(reconstructions).cpu(), strict=True):
                shown = [rgb(to_uint8(to_float(item.image))), rgb(result), heat_picture(heat)]
                flat = (
                    item.key.replace("/", "__")
                    .encode("utf-8", "surrogateescape")[:_NAMED]
                    .decode("utf-8", "ignore")
                )
                write_png(
                    folder / f"{ranks[item.number]:03}-{flat}.png",
                    image_grid([[enlarge(image) for image in shown]]),
                )

    def _batches(
        self, images: Images, numbers: Sequence[int], wanted: Callable[[str], bool] = lambda _: True
    ) -> Iterator[Batch]:
        items = images.items(
            numbers, self.labels, channels=self.network.channels, resolution=self.resolution, wanted=wanted
        )
        return batches(items, self.batch_size)

    def _scores(self, batch: Batch, gaussian: Gaussian) -> dict[str, Tensor]:
        scores, latents = self._image_scores(batch)
        return {**scores, "latent": gaussian.distance(latents)}

    def _image_scores(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Scores that need no Gaussian, each fp64 [B], and the latents."""
        latents, reconstructions = self.network.reconstruct(batch)
        images = self.network.pixels(batch)
        scores = {
            "error": (images - reconstructions).double().square().mean(dim=(1, 2, 3)).cpu(),
            "peak": error_map(images, reconstructions).double().amax(dim=(1, 2)).cpu(),
        }
        if self.distance.module is not None:
            scores["perceptual"] = self.distance(to_uint8(images), to_uint8(reconstructions)).cpu()
        return scores, latents


def _rounded(value: float) -> float:
    """To nine digits, as many as the network's fp32 has: of the others, sums leave the last to chance."""
    return float(f"{value:.9g}")


def _highest(parts: Parts, count: int) -> list[int]:
    """Numbers of the highest-scoring images, highest first; of equal scores the earlier image comes first."""
    rows = np.array([(row["number"], row["score"]) for row in parts.rows()]).reshape(-1, 2)
    return [int(rows[place, 0]) for place in itertools.islice(rank(-rows[:, 1]), count)]


def _summary(parts: Parts, normality: _Normality, which: str, quantile: float) -> dict[str, Any]:
    known = set(normality.labels)
    values: dict[str, list[float]] = {}
    positive: list[bool] = []
    flagged: list[bool] = []
    images = anomalous = 0
    for row in parts.rows():
        images, anomalous = images + 1, anomalous + row["anomalous"]
        if known and row["label"] is not None:
            positive.append(row["label"] not in known)
            flagged.append(bool(row["anomalous"]))
            for name in [*normality.units, "combined"]:
                values.setdefault(name, []).append(row[name])
    result: dict[str, Any] = {
        "score": which,
        "quantile": quantile,
        "threshold": normality.thresholds[which],
        "normal_images": {"measured": normality.images[0], "calibrated_on": normality.images[1]},
        "images": images,
        "anomalous": anomalous,
    }
    if positive:
        truth, found = torch.tensor(positive), torch.tensor(flagged)
        result["labels"] = {
            "normal": normality.labels,
            "anomalies": int(truth.sum()),
            "auroc": {
                name: auroc(torch.tensor(column, dtype=torch.float64), truth)
                for name, column in values.items()
            },
            "detected": _share(found[truth]),
            "false_alarms": _share(found[~truth]),
        }
    return result


def _share(found: Tensor) -> float | None:
    return float(found.double().mean()) if len(found) else None


def _tell(result: dict[str, Any], folder: Path) -> None:
    line = f"anomaly: {result['anomalous']} of {result['images']} images above the threshold of {result['threshold']:.4g}"
    area = result.get("labels", {}).get("auroc", {}).get(result["score"])
    say(f"{line}{'' if area is None else f', AUROC {area:.3f}'}; see {folder / TABLE} and {folder / HEAT}")

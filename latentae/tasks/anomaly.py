"""The verb `anomaly`: score how much images differ from normal ones, and where.

normal images   one half, by key: means of the scores and latent Gaussian; other half: threshold
inputs          scores.csv, one row per image; heat/, images with the highest scores

The scores:

error        Q: mean square of image - reconstruction over elements, images in [-1, 1]
peak         largest value of the blurred error map (mean over channels)
latent       T^2 / z: mean over positions of (v - m)^T S^-1 (v - m) / z, where v is the
             latent vector at a position (Hotelling's T^2)
perceptual   distance of a perceptual network between image and reconstruction

Q and T^2 are the two distances of Jackson & Mudholkar 1979, "Control procedures for residuals
associated with principal component analysis": to the subspace of normal data, and to its center
within that subspace. Their sum, each in units of its mean over normal images, is the combined index
of Yue & Qin 2001, "Reconstruction-based fault identification using a combined index", eq. 12.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentae.data.transforms import to_float, to_uint8
from latentae.errors import DataError, RecipeError
from latentae.files import read_json, write_json
from latentae.keyed import derive_seed
from latentae.measures.perceptual_distance import Distance, choose_distance
from latentae.measures.scores import SAME, rank
from latentae.models.corruptions import blur
from latentae.models.latent_statistics import Moments
from latentae.options import identity, verb
from latentae.pages.images import write_png
from latentae.progress import Progress, say
from latentae.tasks.inputs import Images, Labels, open_images, read_labels
from latentae.tasks.network import Batch, Network
from latentae.tasks.options import AnomalyOptions
from latentae.tasks.outputs import PartedJob, heat_picture, thumbnails

__all__ = ["Gaussian", "anomaly", "auroc", "conformal_threshold", "error_map"]

TABLE, NORMAL, HEAT = "scores.csv", "normal.json", "heat"
PART = 4096
_CALIBRATION = 0.5
_NAME_BYTES = 200  # of the key in a heat map's file name, which also has a number
_COMBINED = ("error", "peak", "latent")
SHRINKAGE = 1e-3  # minimum, so that a channel that never varies has a finite distance
BLUR = 1 / 128  # sigma as a share of the short side: compression leaves single pixels wrong anywhere
_BRIGHT = 2.0  # times the threshold of the peak is the brightest color of a heat map


@verb(AnomalyOptions)
def anomaly(options: AnomalyOptions) -> dict[str, Any]:
    """Score images by how much they differ from normal ones.

    The share `quantile` of normal images is below the threshold. OUT gets scores.csv (one row per
    image, in order), heat/ (image, reconstruction and error map of the highest scores) and
    summary.json. If both normal images and inputs have labels, an image whose label no normal image
    has is an anomaly, and the summary has the area under the ROC curve of each score.
    The end of this file defines the scores.

    Returns:
        The content of summary.json.

    Raises:
        LatentAEError: the model, the images, an option or the output folder can't be used, or there
            are too few normal images.
    """
    network = Network(options, options.batch_size, reconstructs=True)
    distance = _perceptual(options, network)
    normals = open_images(options.normal, "normal images", options.max_pixels)
    images = open_images(options.inputs, max_pixels=options.max_pixels)
    labels, label_kind = read_labels(options.labels)
    facts = {
        "model": network.fingerprint,
        "normal": normals.digest,
        "inputs": images.digest,
        "labels": label_kind,
        **identity(options),
        "perceptual": distance.name,
    }
    job = PartedJob(options.out, "anomaly", facts, images.count, PART)
    if (earlier := job.earlier_result()) is not None:
        return earlier
    work = _Detection(options, network, labels, distance)
    normality = work.normality(normals, job.folder / NORMAL)
    job.run(lambda _, numbers, progress: work.score(images, numbers, normality, progress))
    job.write_table(TABLE, ["key", "label", "score", "anomalous", *normality.units, "combined"])
    result = _summary(job, normality, options)
    work.draw(images, _highest(job, options.heat_maps), normality, job.folder / HEAT)
    job.finish(result)
    say(f"anomaly: {_in_words(result)}; see {job.folder / TABLE} and {job.folder / HEAT}")
    return result


def _perceptual(options: AnomalyOptions, network: Network) -> Distance:
    wanted, channels = options.score == "perceptual", network.config.in_channels
    if options.perceptual == "none":
        if wanted:
            raise RecipeError("score is 'perceptual', but perceptual is 'none'; name a network, or give auto")
        return choose_distance("none", 0)
    if channels != 3 or options.resolution is None:
        raise RecipeError(
            "a perceptual distance needs a resolution and 3 channels, "
            f"got {options.resolution} and {channels}"
        )
    distance = choose_distance(options.perceptual, options.resolution, network.device)
    if distance.module is None and wanted:
        raise RecipeError(f"score is 'perceptual', but {distance.reason}; choose another score")
    return distance


@dataclass(frozen=True)
class _Normality:
    """Measurements of the normal images."""

    gaussian: Gaussian
    units: dict[str, float]
    """Mean of each score over the first half."""
    thresholds: dict[str, float]
    """Of each score, on the other half."""
    images: tuple[int, int]
    """Number in each half."""
    labels: list[str]

    def combine(self, scores: dict[str, Tensor]) -> Tensor:
        """The combined index, 1 on average for normal images: [B]."""
        return torch.stack([scores[name] / self.units[name] for name in _COMBINED]).mean(dim=0)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "gaussian": self.gaussian.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> _Normality:
        return cls(**{**value, "gaussian": Gaussian.from_json(value["gaussian"])})


@dataclass(frozen=True)
class _Detection:
    options: AnomalyOptions
    network: Network
    labels: Labels
    distance: Distance

    def normality(self, normals: Images, file: Path) -> _Normality:
        """Measure the normal images, or read the measurements of an earlier start of this job."""
        if file.is_file():
            return _Normality.from_json(read_json(file))

        def calibrates(key: str) -> bool:
            return derive_seed("calibration", self.options.seed, key) < _CALIBRATION * 2**64

        labels: set[str] = set()
        found: dict[str, list[Tensor]] = {}
        with Progress("anomaly: normal images", normals.count) as progress:
            fit = self._batches(normals, range(normals.count), lambda key: not calibrates(key))
            normality = self._fit(_counted(fit, labels, progress))
            for batch in _counted(self._batches(normals, range(normals.count), calibrates), labels, progress):
                for name, values in self._scores(batch, normality).items():
                    found.setdefault(name, []).append(values)
        columns = {name: torch.cat(values) for name, values in found.items()}
        count = len(columns.get("combined", ()))
        if not count:
            conformal_threshold(torch.empty(0), self.options.quantile)  # raises
        # SAME: rounding must not decide about the image that sets the threshold
        thresholds = {
            name: _rounded(conformal_threshold(values, self.options.quantile) * (1 + SAME))
            for name, values in columns.items()
        }
        images = (normality.images[0], count)
        normality = replace(normality, thresholds=thresholds, images=images, labels=sorted(labels))
        write_json(file, normality.to_json())
        return normality

    def _fit(self, batches: Iterator[Batch]) -> _Normality:
        """Gaussian and units, without thresholds."""
        moments = Moments.empty(self.network.config.latent_channels)
        sums: dict[str, float] = {}
        count = 0
        for batch in batches:
            scores, latents = self._image_scores(batch)
            moments = moments.merge(Moments.of(latents.transpose(0, 1).flatten(1).T))
            for name, values in scores.items():
                sums[name] = sums.get(name, 0.0) + float(values.sum())
            count += len(batch.items)
        if moments.count < 2:
            raise DataError(
                f"found {moments.count} latent vectors of normal images, expected 2 or more; give more images"
            )
        gaussian = Gaussian.of(moments)
        units = {name: _rounded(total / count) for name, total in sums.items()}
        if not all(value > 0 for value in units.values()):
            raise DataError(
                "the model reconstructs the normal images exactly, so errors say nothing; "
                "use a smaller latent"
            )
        return _Normality(gaussian, {**units, "latent": 1.0}, {}, (count, 0), [])

    def score(
        self, images: Images, numbers: Sequence[int], normality: _Normality, progress: Progress
    ) -> list[dict[str, Any]]:
        """The table rows of some images."""
        rows: list[dict[str, Any]] = []
        which = self.options.score
        for batch in self._batches(images, numbers):
            scores = self._scores(batch, normality)
            for position, item in enumerate(batch.items):
                values = {name: _rounded(float(found[position])) for name, found in scores.items()}
                facts = {"number": item.number, "key": item.key, "label": item.label}
                flagged = int(values[which] > normality.thresholds[which])
                rows.append({**facts, "score": values[which], "anomalous": flagged, **values})
            progress.advance(len(batch.items))
        return rows

    def draw(self, images: Images, numbers: list[int], normality: _Normality, folder: Path) -> None:
        """Write image, reconstruction and error map of each of these images."""
        ranks = {number: rank for rank, number in enumerate(numbers, 1)}
        brightest = _BRIGHT * normality.thresholds["peak"]
        for batch in self._batches(images, sorted(numbers)):
            _, reconstructions = self.network.reconstruct(batch)
            maps = error_map(self.network.pixels(batch), reconstructions) / brightest
            for item, heat, result in zip(batch.items, maps, to_uint8(reconstructions).cpu(), strict=True):
                name = f"{ranks[item.number]:03}-{_short(item.key)}.png"
                shown = [to_uint8(to_float(item.image)), result, heat_picture(heat)]
                write_png(folder / name, thumbnails([shown]))

    def _batches(
        self, images: Images, numbers: Sequence[int], wanted: Callable[[str], bool] = lambda _: True
    ) -> Iterator[Batch]:
        return self.network.batches(images, numbers, self.labels, wanted=wanted)

    def _scores(self, batch: Batch, normality: _Normality) -> dict[str, Tensor]:
        """All scores, each fp64 [B]."""
        scores, latents = self._image_scores(batch)
        scores["latent"] = normality.gaussian.distance(latents)
        return {**scores, "combined": normality.combine(scores)}

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


def _counted(batches: Iterator[Batch], labels: set[str], progress: Progress) -> Iterator[Batch]:
    """Pass batches on, collect their labels, and count their images after use."""
    for batch in batches:
        yield batch
        labels.update(item.label for item in batch.items if item.label is not None)
        progress.advance(len(batch.items))


def _short(key: str) -> str:
    """A key as part of a file name."""
    return key.replace("/", "__").encode("utf-8", "surrogateescape")[:_NAME_BYTES].decode("utf-8", "ignore")


def _rounded(value: float) -> float:
    """To nine digits, the precision of fp32; further digits are rounding."""
    return float(f"{value:.9g}")


def _highest(job: PartedJob, count: int) -> list[int]:
    """Numbers of the images with the highest scores, highest first, earlier images first."""
    rows = np.array([(row["number"], row["score"]) for row in job.rows()]).reshape(-1, 2)
    return [int(rows[position, 0]) for position in itertools.islice(rank(-rows[:, 1]), count)]


def _summary(job: PartedJob, normality: _Normality, options: AnomalyOptions) -> dict[str, Any]:
    def column(name: str) -> list[Any]:
        """The values of labeled images, if normal images have labels too."""
        return [row[name] for row in job.rows() if normality.labels and row["label"] is not None]

    result: dict[str, Any] = {
        "score": options.score,
        "quantile": options.quantile,
        "threshold": normality.thresholds[options.score],
        "normal_images": dict(zip(("measured", "calibrated_on"), normality.images, strict=True)),
        "images": job.total,
        "anomalous": sum(row["anomalous"] for row in job.rows()),
    }
    if labels := column("label"):
        truth = torch.tensor([label not in normality.labels for label in labels])
        found = torch.tensor(column("anomalous")).bool()
        scores = (*normality.units, "combined")
        areas = {name: auroc(torch.tensor(column(name), dtype=torch.float64), truth) for name in scores}
        result["labels"] = {
            "normal": normality.labels,
            "anomalies": int(truth.sum()),
            "auroc": areas,
            "detected": _share(found[truth]),
            "false_alarms": _share(found[~truth]),
        }
    return result


def _share(found: Tensor) -> float | None:
    return float(found.double().mean()) if len(found) else None


def _in_words(result: dict[str, Any]) -> str:
    area = result.get("labels", {}).get("auroc", {}).get(result["score"])
    flagged = f"{result['anomalous']} of {result['images']} images"
    area = "" if area is None else f", AUROC {area:.3f}"
    return f"{flagged} above the threshold {result['threshold']:.4g}{area}"


@dataclass(frozen=True)
class Gaussian:
    """Distribution of the latent vectors of normal images.

    Attributes:
        mean: fp64 [z].
        precision: inverse of the covariance, fp64 [z, z].
    """

    mean: Tensor
    precision: Tensor

    @classmethod
    def of(cls, moments: Moments) -> Gaussian:
        """From moments, with a covariance shrunk to the identity (Ledoit & Wolf 2004, eq. 1).

        With n vectors of d numbers the shrinkage is d / (n + d), as if d more vectors had been seen
        that vary evenly.

        Raises:
            DataError: all vectors are equal.
        """
        size = len(moments.mean)
        mean, covariance = torch.from_numpy(moments.mean), torch.from_numpy(moments.m2 / moments.count)
        share = max(size / (moments.count + size), SHRINKAGE)
        scale = float(covariance.diagonal().mean())
        if scale <= 0:
            raise DataError(
                "the latents of the normal images do not vary; the model has collapsed, "
                "or all images are the same"
            )
        sphere = scale * torch.eye(size, dtype=torch.float64)
        return cls(mean, torch.linalg.inv((1 - share) * covariance + share * sphere))

    def distance(self, latents: Tensor) -> Tensor:
        """Squared Mahalanobis distance / z, mean over positions: [B, z, h, w] -> fp64 [B].

        It is 1 on average for normal images.
        """
        vectors = latents.double().cpu().flatten(2).transpose(1, 2) - self.mean
        return ((vectors @ self.precision) * vectors).sum(dim=2).mean(dim=1) / len(self.mean)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"mean": self.mean.tolist(), "precision": self.precision.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Gaussian:
        """From the values of `to_json`."""
        return cls(*(torch.tensor(value[name], dtype=torch.float64) for name in ("mean", "precision")))


def error_map(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Squared error, mean over channels, blurred: two [B, C, H, W] -> [B, H, W]."""
    squares = (images - reconstructions).square().mean(dim=1, keepdim=True)
    sigma = torch.full((len(squares),), BLUR * min(squares.shape[2:]))
    return blur(squares, sigma)[:, 0]


def conformal_threshold(scores: Tensor, quantile: float) -> float:
    """The ceil((n + 1) q)-th smallest of n scores of normal images.

    Another normal image is at or below it with probability q or more, for any distribution (split
    conformal prediction: Vovk, Gammerman & Shafer 2005; Lei et al. 2018, eq. 2).

    Raises:
        DataError: too few scores for this quantile.
    """
    n = len(scores)
    rank = math.ceil((n + 1) * quantile - 1e-9)
    if rank > n:
        needed = math.ceil(quantile / (1 - quantile) - 1e-9)
        raise DataError(
            f"found {n} normal images to calibrate on, expected {needed} or more for quantile {quantile:g}; "
            "give more images, or a lower quantile"
        )
    return float(scores.sort().values[max(rank, 1) - 1])


def auroc(scores: Tensor, positive: Tensor) -> float | None:
    """Area under the ROC curve; equal scores count half (Mann & Whitney 1947).

    Args:
        scores: [N].
        positive: bool [N].

    Returns:
        0 to 1; None without a positive or without a negative.
    """
    positives, negatives = scores[positive].double(), scores[~positive].double().sort().values
    if not len(positives) or not len(negatives):
        return None
    below = torch.searchsorted(negatives, positives, right=False)
    upto = torch.searchsorted(negatives, positives, right=True)
    return float((below + upto).double().mean() / 2 / len(negatives))

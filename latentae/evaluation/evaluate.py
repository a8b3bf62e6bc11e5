"""The verb `evaluate`: how well a model reconstructs images, beside honest baselines at the same budget."""

from __future__ import annotations

import csv
import io
import math
import platform
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import latentae
from latentae.data.index import ShardIndex, load_index
from latentae.data.loader import image_batches, is_held_out
from latentae.data.shards import expand_shards
from latentae.errors import DataError, ImageError, ModelError, RecipeError
from latentae.evaluation.baselines import MAX_PATCH_NUMBERS, PatchPCA, fit_pca
from latentae.evaluation.device import choose_device
from latentae.evaluation.distance import Distance, choose_distance
from latentae.evaluation.images import write_png
from latentae.evaluation.measure import JPEG, MODEL, PCA, QUANTISED, Measurement, measure, spread_positions
from latentae.evaluation.summary import finding, metric_label, paired, print_table
from latentae.evaluation.training_data import TrainingData, recorded_training_data
from latentae.files import read_json, write_json, write_text
from latentae.jobs import Job
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.pretrained import ModelSource, load_model, resolve_model
from latentae.progress import Progress, say

__all__ = ["CSV", "EXAMPLES", "FORMAT_VERSION", "METRICS", "REPORT", "evaluate"]

FORMAT_VERSION = 1
METRICS, CSV, REPORT, EXAMPLES = "metrics.json", "per_image.csv", "report.html", "examples"
EXAMPLE_COUNT = 6
PCA_IMAGES = 2000


def evaluate(
    model: str | Path,
    shards: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    resolution: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    perceptual: str = "auto",
    pca_shards: str | Path | Sequence[str | Path] | None = None,
    seed: int = 0,
    weights: str = "ema",
    device: str = "auto",
) -> dict[str, Any]:
    """Measure reconstruction, the latents' statistics and the baselines on images in shards.

    Args:
        model: run folder, checkpoint or exported folder.
        shards: held-out images, as a folder, a file, a glob or a brace pattern.
        out: folder for metrics.json, per_image.csv, report.html and example pictures; without it a table is printed.
        resolution: side in pixels after resize and centre crop; the model's own when not given.
        batch_size: images at a time; changes speed and memory only.
        limit: at most that many images, the first in shard order.
        perceptual: "auto" (the best whose weights are on this machine), "vgg", "alex", "squeeze", "efficientnet-lite0" or "none".
        pca_shards: images to fit PCA on; the training shards recorded with the model when not given.
        seed: of the bootstrap.
        weights: "ema" or "raw".
        device: "auto", "cpu", "cuda" or "cuda:N".

    Returns:
        What metrics.json holds.

    Raises:
        ModelError, ShardError, ImageError, WeightsError, OutputError: what was given can't be used; nothing is left half-written.
    """
    where = choose_device(device)
    source = resolve_model(model, weights)
    size = _resolution(source, resolution)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise RecipeError(f"batch_size is {batch_size} and limit {limit}; both must be at least 1")
    index = load_index(expand_shards(shards))
    training = recorded_training_data(source) if pca_shards is None else TrainingData(tuple(expand_shards(pca_shards)))
    job = None
    if out is not None:
        inputs = {
            "model": source.fingerprint,
            "shards": index.digest,
            "resolution": size,
            "limit": limit,
            "perceptual": perceptual,
            "pca": load_index(training.shards).digest if training.shards else None,
            "seed": seed,
        }
        distance = choose_distance(perceptual, size, where)  # before the folder is claimed, so that a bad name leaves no trace
        job = Job.open(out, "evaluate", inputs)
        if job.state == "finished":
            say(f"{out} already holds this evaluation; see {Path(out) / REPORT}")
            return read_json(Path(out) / METRICS)
    else:
        distance = choose_distance(perceptual, size, where)
    network, source = load_model(model, weights, where)
    task = _Task(network, source, index, size, batch_size, limit, training, seed, distance, where)
    measurement, pca = task.run()
    result = task.summarise(measurement, pca)
    if job is None:
        print_table(result)
        return result
    _write(job.folder, result, measurement, source)
    job.finish(images=len(measurement.keys))
    say(f"evaluated {len(measurement.keys)} images; see {job.folder / REPORT}")
    return result


def _resolution(source: ModelSource, asked: int | None) -> int:
    factor, config = source.config.downsampling, source.config
    size = source.resolution if asked is None else asked
    if size < 1 or size % factor:
        nearest = max(round(size / factor), 1) * factor
        raise ImageError(f"resolution is {size}, this model needs a multiple of {factor}; use {nearest}")
    if config.in_channels != 3 or config.out_channels != 3:
        raise ModelError(
            f"the model has {config.in_channels} channels in and {config.out_channels} out; evaluation needs RGB, 3 and 3"
        )
    return size


@dataclass(frozen=True)
class _Task:
    """One evaluation, its inputs checked."""

    model: AutoencoderKL
    source: ModelSource
    index: ShardIndex
    resolution: int
    batch_size: int
    limit: int | None
    training: TrainingData
    seed: int
    distance: Distance
    device: torch.device

    def run(self) -> tuple[Measurement, PatchPCA | str]:
        """The measurement, and the fitted PCA or why there is none."""
        shards = [entry.path for entry in self.index.shards]
        total = min(self.index.samples, self.limit or self.index.samples)
        pca = self._fit_pca()
        measurement = measure(
            self.model,
            image_batches(shards, self.resolution, self.batch_size, limit=self.limit),
            distance=self.distance,
            pca=pca if isinstance(pca, PatchPCA) else None,
            device=self.device,
            total=total,
            examples=spread_positions(total, EXAMPLE_COUNT),
        )
        return measurement, pca

    def _fit_pca(self) -> PatchPCA | str:
        config = self.source.config
        if not self.training.shards:
            return f"{self.training.reason}; give --pca-shards"
        numbers = 3 * config.downsampling**2
        if numbers > MAX_PATCH_NUMBERS:
            return f"a patch has {numbers} numbers; the covariance in closed form is limited to {MAX_PATCH_NUMBERS}"
        try:
            return fit_pca(self._pca_images(), config.downsampling, config.latent_channels)
        except DataError as error:
            return str(error)

    def _pca_images(self) -> Iterator[Tensor]:
        """Up to PCA_IMAGES training images, as many from each shard, without those that training held out."""
        entries = [entry for entry in load_index(self.training.shards).shards if entry.samples]
        random.Random(self.seed).shuffle(entries)
        share = math.ceil(PCA_IMAGES / len(entries))
        with Progress("fitting PCA", None) as progress:
            for entry in entries[:PCA_IMAGES]:
                for batch in image_batches([entry.path], self.resolution, self.batch_size, limit=share):
                    kept = [i for i, key in enumerate(batch.keys) if not is_held_out(key, self.training.held_out)]
                    progress.advance(len(kept))
                    if kept:
                        yield batch.images[kept].to(self.device)


def _write(folder: Path, result: dict[str, Any], measurement: Measurement, source: ModelSource) -> None:
    """Pictures, table and report first, metrics.json last."""
    from latentae.evaluation.evaluation_page import write_evaluation_report

    result["examples"] = []
    for number, example in enumerate(measurement.examples):
        files = {}
        for method, image in {"original": example.original, **example.images}.items():
            files[method] = f"{EXAMPLES}/{number}-{method}.png"
            write_png(folder / files[method], image)
        values = {method: value if math.isfinite(value) else None for method, value in example.psnr.items()}
        result["examples"].append({"key": example.key, "files": files, "psnr": values})
    write_text(folder / CSV, _csv(measurement))
    write_evaluation_report(folder, result, source.metrics_log)
    write_json(folder / METRICS, result)


def _csv(measurement: Measurement) -> str:
    """One row per image; an empty cell where a method has no result."""
    columns = {
        (name if method == MODEL else f"{method}_{name}"): values
        for method, scores in sorted(measurement.scores.items(), key=lambda item: item[0] != MODEL)
        for name, values in scores.values.items()
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", *columns])
    for row, key in enumerate(measurement.keys):
        writer.writerow([key, *("" if math.isnan(values[row]) else repr(values[row]) for values in columns.values())])
    return text.getvalue()

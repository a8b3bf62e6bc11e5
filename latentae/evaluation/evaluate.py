"""The verb `evaluate`: how well a model reconstructs images, beside honest baselines at the same budget."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentae.data.index import load_index
from latentae.data.loader import image_batches
from latentae.data.shards import expand_shards
from latentae.device import choose_device
from latentae.errors import DataError, ImageError, ModelError, RecipeError
from latentae.evaluation.distance import choose_distance
from latentae.evaluation.images import write_png
from latentae.evaluation.measure import MODEL, Measurement, measure
from latentae.evaluation.results import PCA_IMAGES, Setting, summarise
from latentae.evaluation.summary import print_table
from latentae.evaluation.training_data import given_training_data, recorded_training_data, training_images
from latentae.files import read_json, write_json, write_text
from latentae.jobs import Job
from latentae.models.pca import MAX_PATCH_NUMBERS, PatchPCA, fit_pca, sketch_pca
from latentae.models.pretrained import ModelSource, load_model, resolve_model
from latentae.progress import say

__all__ = ["evaluate"]

METRICS, CSV, REPORT, EXAMPLES = "metrics.json", "per_image.csv", "report.html", "examples"
EXAMPLE_COUNT = 6


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
        LatentAEError: the model, the shards, an option or the output folder can't be used. A folder is claimed only after the
            inputs were checked, and metrics.json is written last.
    """
    source, where = resolve_model(model, weights), choose_device(device)
    size = _resolution(source, resolution)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise RecipeError(f"batch_size is {batch_size} and limit is {limit}; both must be at least 1")
    training = recorded_training_data(source) if pca_shards is None else given_training_data(pca_shards)
    setting = Setting(
        source, load_index(expand_shards(shards)), size, training, seed, choose_distance(perceptual, size, where), where
    )
    job = None
    if out is not None:
        inputs = {
            "model": source.fingerprint,
            "shards": setting.index.digest,
            "resolution": size,
            "limit": limit,
            "perceptual": perceptual,
            "pca_shards": training.index.digest if pca_shards is not None and training.index else None,
            "seed": seed,
        }
        job = Job.open(out, "evaluate", inputs)
        if job.state == "finished":
            say(f"{out} already holds this evaluation; see {Path(out) / REPORT}")
            return read_json(Path(out) / METRICS)
    result, measurement = _run(setting, weights, batch_size, limit, recorded=pca_shards is None)
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
    if (config.in_channels, config.out_channels) != (3, 3):
        raise ModelError(f"the model has {config.in_channels} channels in and {config.out_channels} out; evaluation needs RGB")
    return size


def _run(
    setting: Setting, weights: str, batch_size: int, limit: int | None, *, recorded: bool
) -> tuple[dict[str, Any], Measurement]:
    model, _ = load_model(setting.source.path, weights, setting.device)
    total = min(setting.index.samples, limit or setting.index.samples)
    pca = _fit_pca(setting, batch_size, recorded)
    measurement = measure(
        model,
        image_batches([entry.path for entry in setting.index.shards], setting.resolution, batch_size, limit=limit),
        distance=setting.distance,
        pca=pca if isinstance(pca, PatchPCA) else None,
        device=setting.device,
        total=total,
        examples=_spread(total, EXAMPLE_COUNT),
    )
    return summarise(setting, measurement, pca, sum(parameter.numel() for parameter in model.parameters())), measurement


def _fit_pca(setting: Setting, batch_size: int, recorded: bool) -> PatchPCA | str:
    """PCA on training images, or why there is none; shards that the user named must work."""
    config, training = setting.source.config, setting.training
    if training.index is None:
        return f"{training.reason}; name images to fit it on with pca_shards"
    fit = fit_pca if 3 * config.downsampling**2 <= MAX_PATCH_NUMBERS else sketch_pca
    images = training_images(training, setting.resolution, batch_size, PCA_IMAGES, setting.seed)
    try:
        return fit((batch.to(setting.device) for batch in images), config.downsampling, config.latent_channels)
    except DataError as error:
        if not recorded:
            raise
        return str(error)


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` positions spread evenly over `count` images, first and last included."""
    wanted = min(wanted, count)
    return [round(index * (count - 1) / max(wanted - 1, 1)) for index in range(wanted)]


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
    """One row per image, the model's own columns first; an empty cell where a method has no result."""
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

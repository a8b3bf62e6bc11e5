"""The verb `evaluate`: how well a model reconstructs images, beside honest baselines at the same budget.

One pass over the images, in chunks that several processes share, gives rows of numbers and sums; then one process merges them, takes a
second look at a few images (pictures, disturbed latents, rate and distortion), and writes the report.
"""

from __future__ import annotations

import csv
import io
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentae.errors import RecipeError
from latentae.evaluation.finish import finish
from latentae.evaluation.measure import MODEL, load_images, measure
from latentae.evaluation.measurement import Measurement
from latentae.evaluation.options import EvaluateOptions
from latentae.evaluation.setting import Setting, prepare
from latentae.evaluation.showing import Shown
from latentae.evaluation.work import PartsFolder, samples_at
from latentae.file_names import METRICS, PER_IMAGE, REPORT
from latentae.files import read_json, write_json, write_text
from latentae.jobs import Job, resolve_task
from latentae.keyed import run_seed
from latentae.measures.scores import print_table
from latentae.options import verb
from latentae.pages.images import write_png
from latentae.progress import Progress, say

__all__ = ["evaluate"]

EXAMPLES, PARTS = "examples", "parts"


@verb(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Measure reconstruction, the latent space and the baselines on images in shards.

    Started by torchrun, accelerate or a SLURM array, each process takes its share of the images; the one that finds all of them measured
    writes the report. The same command goes on where it stopped.

    Returns:
        What metrics.json holds; empty where other processes are still at it.

    Raises:
        LatentAEError: the model, the shards, an option or the output folder can't be used. A folder is claimed only after the
            inputs were checked, and metrics.json is written last.
    """
    task, tasks = resolve_task(None, None)
    if options.out is None and tasks > 1:
        raise RecipeError(f"{tasks} processes share this evaluation through a folder; give one with --out")
    setting = prepare(
        options.model,
        options.shards,
        compare=options.compare or (),
        resolution=options.resolution,
        batch_size=options.batch_size,
        limit=options.limit,
        perceptual=options.perceptual,
        frechet=options.frechet,
        details=options.details,
        diffusability=options.diffusability,
        pca_shards=options.pca_shards,
        seed=run_seed(options.seed),
        weights=options.weights,
        device=options.device,
        max_pixels=options.max_pixels,
    )
    if options.out is None:
        with tempfile.TemporaryDirectory(prefix="latentae-") as temporary:
            result, _, _ = finish(setting, _measured(setting, Path(temporary), 0, 1))
        print_table(result)
        return result
    job = Job.open(options.out, "evaluate", setting.inputs())
    if job.state == "finished":
        say(f"{options.out} already holds this evaluation; see {Path(options.out) / REPORT}")
        return read_json(Path(options.out) / METRICS)
    parts = _measured(setting, job.folder / PARTS, task, tasks)
    return _conclude(setting, job, parts)


def _measured(setting: Setting, folder: Path, task: int, tasks: int) -> PartsFolder:
    """The folder of chunks, with this process's share measured."""
    parts = PartsFolder(folder, setting.total)
    share = parts.share(task, tasks)
    if not share:
        return parts
    instruments = setting.instruments()
    counts = {number: len(parts.chunks[number]) for number in share}
    done = setting.total - sum(counts.values()) if tasks == 1 else 0
    with Progress("evaluating", done + sum(counts.values()), initial=done) as progress:
        for number in share:
            positions = [setting.positions[row] for row in parts.chunks[number]]
            samples = samples_at(setting.index, positions)
            images = _counted(
                load_images(samples, setting.resolution, setting.channels, setting.max_pixels), progress
            )
            measure(instruments, images, setting.batch_size).save(parts.path(number))
    return parts


def _counted(images: Iterator[Any], progress: Progress) -> Iterator[Any]:
    for image in images:
        yield image
        progress.advance()


def _conclude(setting: Setting, job: Job, parts: PartsFolder) -> dict[str, Any]:
    """Write the results, if every chunk is in place and no other process is writing them."""
    folder = job.folder
    with parts.alone() as mine:
        if Job.read(folder).get("finished"):
            return read_json(folder / METRICS)
        if not mine or not parts.complete():
            say("this process has done its share; the one that ends last writes the report")
            return {}
        result, measurement, shown = finish(setting, parts)
        _write(folder, result, measurement, shown, setting)
        job.finish(images=len(measurement.keys))
        shutil.rmtree(parts.folder, ignore_errors=True)
    say(f"evaluated {len(measurement.keys)} images; see {folder / REPORT}")
    return result


def _write(
    folder: Path, result: dict[str, Any], measurement: Measurement, shown: Shown, setting: Setting
) -> None:
    """Pictures, table and report first, metrics.json last."""
    from latentae.evaluation.report import write_evaluation_report
    from latentae.pages.error_map import error_map

    result["examples"] = []
    for number, example in enumerate(shown.examples):
        files = {}
        heat = error_map(example.original, example.images[MODEL])
        for method, image in {"original": example.original, **example.images, "heat": heat}.items():
            files[method] = f"{EXAMPLES}/{number}-{method}.png"
            write_png(folder / files[method], image)
        values = {method: value if math.isfinite(value) else None for method, value in example.psnr.items()}
        result["examples"].append({"kind": example.kind, "key": example.key, "files": files, "psnr": values})
    for name, picture in shown.pictures.items():
        write_png(folder / name, picture)
    write_text(folder / PER_IMAGE, _csv(measurement))
    write_evaluation_report(folder, result, setting.source.metrics_log)
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
        writer.writerow(
            [key, *("" if math.isnan(values[row]) else repr(values[row]) for values in columns.values())]
        )
    return text.getvalue()

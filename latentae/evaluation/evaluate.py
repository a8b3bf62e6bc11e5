"""The verb `evaluate`: measure a model and baselines at the same budget on images.

Processes share one pass over the images, divided into chunks. The process that finishes last merges
the chunks, measures details on a few images and writes the report.
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
from latentae.evaluation.details import Details, measure_details
from latentae.evaluation.loaded_inputs import LoadedInputs, load_inputs
from latentae.evaluation.measure_images import Loaded, measure
from latentae.evaluation.measurement import MODEL, ChunkFiles, Measurement
from latentae.evaluation.options import EvaluateOptions
from latentae.evaluation.results import summarize
from latentae.file_names import METRICS, PER_IMAGE, REPORT
from latentae.files import read_json, write_json, write_text
from latentae.jobs import Job, resolve_task
from latentae.measures.scores import print_table
from latentae.options import verb
from latentae.pages.images import write_png
from latentae.progress import Progress, say

__all__ = ["evaluate"]


@verb(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Measure reconstruction, the latent space and the baselines on images in shards.

    Under torchrun, accelerate or a SLURM array, each process measures its share of the images. The
    process that finishes last writes the report. Run the same command again to resume.

    Returns:
        The content of metrics.json; empty if other processes are still running.

    Raises:
        LatentAEError: the model, the shards, an option or the output folder can't be used. The
            folder is claimed only after the inputs are checked, and metrics.json is written last.
    """
    task, tasks = resolve_task(None, None)
    if options.out is None and tasks > 1:
        raise RecipeError(f"{tasks} processes share this evaluation through a folder; give one with --out")
    inputs = load_inputs(options)
    if options.out is None:
        with tempfile.TemporaryDirectory(prefix="latentae-") as temporary:
            measurement = _measure_share(inputs, Path(temporary), 0, 1).merged()
        result = summarize(inputs, measurement, measure_details(inputs, measurement))
        print_table(result)
        return result
    job = Job.open(options.out, "evaluate", inputs.identity())
    if job.state == "finished":
        say(f"{options.out} already holds this evaluation; see {job.folder / REPORT}")
        return read_json(job.folder / METRICS)
    files = _measure_share(inputs, job.folder / "parts", task, tasks)
    with files.lock() as locked:
        if Job.read(job.folder).get("finished"):
            return read_json(job.folder / METRICS)
        if not locked or not files.complete():
            say("this process has finished its share; the process that finishes last writes the report")
            return {}
        return _conclude(inputs, job, files)


def _measure_share(inputs: LoadedInputs, folder: Path, task: int, tasks: int) -> ChunkFiles:
    """Measure this process's share of the chunks."""
    files = ChunkFiles(folder, len(inputs.positions))
    share = files.share(task, tasks)
    if not share:
        return files
    instruments = inputs.instruments()
    here = sum(len(files.chunks[number]) for number in share)
    done = len(inputs.positions) - here if tasks == 1 else 0
    with Progress("evaluating", done + here, initial=done) as progress:
        for number in share:
            images = inputs.images_at([inputs.positions[row] for row in files.chunks[number]])
            chunk = measure(instruments, _counted(images, progress), inputs.options.batch_size)
            chunk.save(files.path(number))
    return files


def _counted(images: Iterator[Loaded], progress: Progress) -> Iterator[Loaded]:
    for image in images:
        yield image
        progress.advance()


def _conclude(inputs: LoadedInputs, job: Job, files: ChunkFiles) -> dict[str, Any]:
    """Write pictures, table and report, then metrics.json."""
    from latentae.evaluation.report import write_evaluation_report

    measurement = files.merged()
    details = measure_details(inputs, measurement)
    result = summarize(inputs, measurement, details)
    result["examples"] = _write_examples(job.folder, details)
    for name, picture in details.pictures.items():
        write_png(job.folder / name, picture)
    write_text(job.folder / PER_IMAGE, _csv(measurement))
    write_evaluation_report(job.folder, result, inputs.source.metrics_log)
    write_json(job.folder / METRICS, result)
    job.finish(images=len(measurement.keys))
    shutil.rmtree(files.folder, ignore_errors=True)
    say(f"evaluated {len(measurement.keys)} images; see {job.folder / REPORT}")
    return result


def _write_examples(folder: Path, details: Details) -> list[dict[str, Any]]:
    from latentae.pages.images import error_map

    written = []
    for number, example in enumerate(details.examples):
        heat = error_map(example.original, example.images[MODEL])
        files = {}
        for method, image in {"original": example.original, **example.images, "heat": heat}.items():
            files[method] = f"examples/{number}-{method}.png"
            write_png(folder / files[method], image)
        psnr = {method: value if math.isfinite(value) else None for method, value in example.psnr.items()}
        written.append({"kind": example.kind, "key": example.key, "files": files, "psnr": psnr})
    return written


def _csv(measurement: Measurement) -> str:
    """One row per image, the model's columns first; an empty cell where a method has no result."""
    columns = {
        (name if method == MODEL else f"{method}_{name}"): values
        for method, scores in sorted(measurement.scores.items(), key=lambda item: item[0] != MODEL)
        for name, values in scores.values.items()
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", *columns])
    for row in zip(measurement.keys, *columns.values(), strict=True):
        writer.writerow([row[0], *("" if math.isnan(value) else repr(value) for value in row[1:])])
    return text.getvalue()

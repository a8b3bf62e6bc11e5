"""The verb `quickstart`: from bundled photos to an export, a check in diffusers and a report."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.data.builtin import HELD_OUT, TRAINING, write_photo_tiles
from latentae.data.loader import image_batches
from latentae.data.shard_files import expand_shards
from latentae.data.shards import shards
from latentae.data.transforms import to_float, to_uint8
from latentae.encoding.encode import encode
from latentae.encoding.latent_dataset import LatentDataset
from latentae.errors import MissingDependencyError, ModelError
from latentae.evaluation.evaluate import evaluate
from latentae.evaluation.report import evaluation_context, example_pictures
from latentae.examples.options import QuickstartOptions
from latentae.exporting.export import export
from latentae.file_names import METRICS_LOG, REPORT
from latentae.files import read_json, write_json, write_text
from latentae.jobs import Job
from latentae.measures.scores import interval_text
from latentae.models.pretrained import load_model
from latentae.options import verb
from latentae.pages.images import picture, write_png
from latentae.pages.render import render
from latentae.progress import duration, say
from latentae.training.dry_run import measure_speed
from latentae.training.init import init
from latentae.training.recipe import Recipe, load_recipe
from latentae.training.train import train

__all__ = ["quickstart", "write_quickstart_page"]

RECIPE = "dc-tiny"
TRAINING_TILE, TRAINING_STRIDE = 256, 128  # overlapping, for crops at any position; quick to decode
HELD_OUT_TILE = 128  # without overlap: every pixel counts once
PLAN, START = "plan.json", "step-0"
TOLERANCE, CHECKED_IMAGES = 1e-5, 8  # of reconstructions in diffusers
PROGRESS_IMAGES = 4  # rows of pictures from PCA to the trained model


@verb(QuickstartOptions)
def quickstart(options: QuickstartOptions) -> Path:
    """Run all verbs on photos that ship with scikit-image and scikit-learn; run again to resume.

    The speed is measured first. The number of images that fits into `minutes` is then recorded, so
    that the rest does not depend on the clock.

    Returns:
        The report, `out/report.html`.

    Raises:
        RecipeError: no time or images to train with.
        OutputError: `out` holds something else.
        MissingDependencyError: an optional package is missing; `pip install 'latentae[quickstart]'`
            installs all.
    """
    inputs = {
        "minutes": options.minutes if options.images is None else None,
        "images": options.images,
        "seed": options.seed,
    }
    job = Job.open(options.out, "quickstart", inputs)
    report = job.folder / REPORT
    if job.state == "finished":
        say(f"the quickstart in {options.out} is finished; open {report}")
        return report
    home, clock = job.folder, Stopwatch()
    training, held_out = home / "training-shards", home / "held-out-shards"
    _write_shards(home / "photos" / "training", training, TRAINING, TRAINING_TILE, TRAINING_STRIDE)
    _write_shards(home / "photos" / "held-out", held_out, HELD_OUT, HELD_OUT_TILE, HELD_OUT_TILE)
    clock.lap("photos to shards")
    data = {"shards": str(training), "validation": str(held_out)}
    recipe = _planned(home / PLAN, load_recipe(RECIPE, {"seed": options.seed, "data": data}), options)
    clock.lap("measuring the speed")
    init(recipe, training, home / START)
    clock.lap("PCA start")
    run = train(recipe, home / "run")
    clock.lap("training")
    result = evaluate(
        run,
        held_out,
        compare=[home / START],
        resolution=HELD_OUT_TILE,
        out=home / "evaluation",
        pca_shards=training,
    )
    clock.lap("evaluation")
    encode(run, training, home / "latents", resolution=HELD_OUT_TILE)
    clock.lap("encoding")
    export(run, home / "export", statistics=home / "latents", metrics=result)
    clock.lap("export")
    latents = LatentDataset(home / "latents")
    check = decode_in_diffusers(run, home / "export", latents, held_out, HELD_OUT_TILE)
    clock.lap("check in diffusers")
    write_quickstart_page(home, result, check, recipe, clock.laps)
    job.finish(
        psnr=result["metrics"]["psnr"]["mean"],
        ssim=result["metrics"]["ssim"]["mean"],
        largest_difference_to_diffusers=check.largest_difference,
    )
    say(f"done in {duration(sum(clock.laps.values()))}; open {report}")
    return report


class Stopwatch:
    """Seconds of each stage of this run."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Record the stage that has just ended."""
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now


def _write_shards(photos: Path, target: Path, names: Sequence[str], tile: int, stride: int) -> None:
    if not (target / "index.json").is_file():
        say(f"{photos.name} photos: {', '.join(_plain(names))}")
        write_photo_tiles(photos, names, tile, stride)
    shards(photos, target, shard_size=100)


def _plain(files: Sequence[str]) -> list[str]:
    return [name.partition(".")[0].replace("_", " ") for name in files]


def _planned(plan: Path, recipe: Recipe, options: QuickstartOptions) -> Recipe:
    """The recipe with the recorded or given number of images, or what fits into the minutes."""
    if not plan.is_file():
        images, speed = options.images, None
        if images is None:
            say("measuring the speed of training")
            speed = measure_speed(recipe)
            images = max(1, round(options.minutes * 60 * speed / recipe.batch_size)) * recipe.batch_size
            say(f"{speed:.3g} images per second: {images} images in {options.minutes:g} minutes")
        write_json(plan, {"images": images, "images_per_second": speed})
    images = int(read_json(plan)["images"])
    return load_recipe(recipe, {"images": images, "checkpoint_every_images": -(-images // 4)})


def write_quickstart_page(
    out: Path, result: Mapping[str, Any], check: DiffusersCheck, recipe: Recipe, laps: Mapping[str, float]
) -> None:
    """Write the report and the image that diffusers decoded."""
    write_png(out / "decoded-by-diffusers.png", check.decoded)
    config, evaluation = recipe.autoencoder_config(), out / "evaluation"
    (start,) = result["compared"]
    stages = {"pca": result["baselines"]["pca"], start["name"]: start, "model": result}
    labels = {"original": "original", "pca": "PCA", start["name"]: "step 0", "model": "trained"}
    examples = [e for e in result.get("examples") or () if e.get("kind", "spread") == "spread"]
    page = render(
        "quickstart.html",
        **evaluation_context(evaluation, result, out / "run" / METRICS_LOG),
        recipe=recipe,
        config=config,
        stages={
            labels[name]: [interval_text(metric, entry["metrics"][metric]) for metric in result["metrics"]]
            for name, entry in stages.items()
            if "metrics" in entry
        },
        progress=[example_pictures(evaluation, example, labels) for example in examples[:PROGRESS_IMAGES]],
        check=check,
        decoded=picture(check.decoded, "decoded by diffusers", "a training tile, from its stored latent"),
        training_photos=_plain(TRAINING),
        held_out_photos=_plain(HELD_OUT),
        laps=laps,
    )
    write_text(out / REPORT, page)


@dataclass(frozen=True)
class DiffusersCheck:
    """Result of `decode_in_diffusers`.

    Attributes:
        version: of diffusers.
        key: sample whose stored latent was decoded.
        decoded: image of that latent, uint8 [3, H, W].
        largest_difference: between our and diffusers' reconstructions, range [-1, 1].
        images: number of images compared.
    """

    version: str
    key: str
    decoded: Tensor
    largest_difference: float
    images: int


@torch.inference_mode()
def decode_in_diffusers(
    run: Path, exported: Path, latents: LatentDataset, shards: Path, resolution: int
) -> DiffusersCheck:
    """Load an export with diffusers, compare reconstructions on a CPU, and decode a stored latent.

    Raises:
        MissingDependencyError: diffusers is not installed.
        ModelError: the reconstructions differ by more than rounding.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise MissingDependencyError(
            "checking the export needs diffusers; pip install 'latentae[quickstart]'"
        )
    import diffusers

    ours, _ = load_model(run)
    theirs: Any = getattr(diffusers, ours.config.class_name).from_pretrained(exported).eval()
    largest, count = 0.0, 0
    for batch in image_batches(expand_shards(shards), resolution, 4, limit=CHECKED_IMAGES):
        images = to_float(batch.images)
        expected = ours.decode(ours.encode(images).mode())
        encoded = theirs.encode(images)  # diffusers' AutoencoderDC has no posterior
        latent = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        difference = (theirs.decode(latent).sample - expected).abs().max().item()
        largest, count = max(largest, difference), count + len(images)
    if not largest <= TOLERANCE:
        raise ModelError(
            f"diffusers' reconstructions differ by {largest:.3g} from ours, expected at most {TOLERANCE}; "
            "please report this"
        )
    stored = latents[len(latents) // 3]
    decoded = to_uint8(theirs.decode(stored.mean.float()[None]).sample)[0]
    return DiffusersCheck(diffusers.__version__, stored.key, decoded, largest, count)

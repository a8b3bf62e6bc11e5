"""The whole line on embedded photos: shards, training, evaluation, encoding, export, and the export in plain diffusers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from latentae.data.builtin import HELD_OUT, TRAINING, write_photo_tiles
from latentae.encoding.encode import encode
from latentae.encoding.latent_dataset import LatentDataset
from latentae.errors import RecipeError
from latentae.evaluation.evaluate import evaluate
from latentae.examples.diffusers_check import DiffusersCheck, decode_in_diffusers
from latentae.examples.options import QuickstartOptions
from latentae.examples.quickstart_page import write_quickstart_page
from latentae.exporting.export import export
from latentae.file_names import REPORT
from latentae.files import read_json, write_json
from latentae.jobs import Job
from latentae.options import verb
from latentae.progress import say
from latentae.training.init import init
from latentae.training.recipe import Recipe, load_recipe
from latentae.training.rehearsal import measure_speed
from latentae.training.train import train

__all__ = ["quickstart"]

RECIPE = "dc-tiny"
TRAINING_TILE, TRAINING_STRIDE = (
    256,
    128,
)  # overlapping: crops of any position, small enough to decode quickly
HELD_OUT_TILE = 128  # side by side: every pixel is judged once
PLAN, START = "plan.json", "step-0"


@verb(QuickstartOptions)
def quickstart(options: QuickstartOptions) -> Path:
    """Run the main job on photos that ship with scikit-image and scikit-learn; run again, it goes on where it stopped.

    The speed is measured first; the number of images that fits into `minutes` is then fixed and recorded, so that nothing that
    follows depends on the clock.

    Returns:
        The report, `out/report.html`.

    Raises:
        RecipeError: no time or images to train with.
        OutputError: `out` holds something else.
        MissingDependencyError: an optional package is missing; `pip install 'latentae[quickstart]'` has them all.
    """
    if (options.images is not None and options.images < 1) or not 0 < options.minutes < 1e5:
        raise RecipeError(
            f"minutes is {options.minutes} and images is {options.images}; give a positive number"
        )
    job = Job.open(
        options.out,
        "quickstart",
        {
            "minutes": options.minutes if options.images is None else None,
            "images": options.images,
            "seed": options.seed,
        },
    )
    report = job.folder / REPORT
    if job.state == "finished":
        say(f"the quickstart in {options.out} is finished; open {report}")
        return report
    home, clock = job.folder, Stopwatch()
    _make_shards(home)
    clock.lap("photos to shards")
    recipe = _planned(home, options.minutes, options.images, options.seed)
    clock.lap("measuring the speed")
    start = home / START
    init(recipe, str(recipe.data.shards), start)
    clock.lap("the start")
    run = train(recipe, home / "run")
    clock.lap("training")
    result = evaluate(
        run,
        home / "held-out-shards",
        compare=[start],
        resolution=HELD_OUT_TILE,
        out=home / "evaluation",
        pca_shards=home / "training-shards",
    )
    clock.lap("evaluation")
    encode(run, home / "training-shards", home / "latents", resolution=HELD_OUT_TILE)
    clock.lap("encoding")
    export(run, home / "export", statistics=home / "latents", metrics=result)
    clock.lap("export")
    check = decode_in_diffusers(
        run, home / "export", LatentDataset(home / "latents"), home / "held-out-shards", HELD_OUT_TILE
    )
    clock.lap("in diffusers")
    write_quickstart_page(home, result, check, recipe, clock.laps)
    job.finish(**_summary(result, check))
    say(f"done in {sum(clock.laps.values()) / 60:.1f} minutes; open {report}")
    return report


class Stopwatch:
    """Seconds that each part took in this run."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """What just ended is called `name`."""
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now


def _make_shards(home: Path) -> None:
    from latentae.data.shards import shards

    for kind, names, tile, stride in (
        ("training", TRAINING, TRAINING_TILE, TRAINING_STRIDE),
        ("held-out", HELD_OUT, HELD_OUT_TILE, HELD_OUT_TILE),
    ):
        target = home / f"{kind}-shards"
        if not (target / "index.json").is_file():
            say(f"{kind} photos: {', '.join(name.partition('.')[0] for name in names)}")
            write_photo_tiles(home / "photos" / kind, names, tile, stride)
        shards(home / "photos" / kind, target, shard_size=100)


def _planned(home: Path, minutes: float, images: int | None, seed: int) -> Recipe:
    """The recipe with a fixed number of images: the recorded one, the given one, or what fits into the minutes."""
    recipe = load_recipe(
        RECIPE,
        {
            "seed": seed,
            "data": {"shards": str(home / "training-shards"), "validation": str(home / "held-out-shards")},
        },
    )
    if not (home / PLAN).is_file():
        speed = None
        if images is None:
            say("measuring the speed of training")
            speed = measure_speed(recipe)
            images = max(1, round(minutes * 60 * speed / recipe.batch_size)) * recipe.batch_size
            say(f"{speed:.3g} images a second: {images} images in {minutes:g} minutes")
        write_json(home / PLAN, {"images": images, "images_per_second": speed})
    images = int(read_json(home / PLAN)["images"])
    return load_recipe(recipe, {"images": images, "checkpoint_every_images": -(-images // 4)})


def _summary(result: dict[str, Any], check: DiffusersCheck) -> dict[str, Any]:
    return {
        "psnr": result["metrics"]["psnr"]["mean"],
        "ssim": result["metrics"]["ssim"]["mean"],
        "largest_difference_to_diffusers": check.largest_difference,
    }

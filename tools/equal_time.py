"""Train with latentae's trainer and with a plain, correct loop on diffusers' AutoencoderKL for the
same minutes.

    python tools/equal_time.py [--minutes 3] [--seeds 0 1 2] [--recipe tiny-cpu]

Both train the same shape on the photos of the dependencies: the same seed, order of crops, batch,
losses, rate and schedule. The plain loop is what diffusers' documentation leads to, without the
faults of its example script: PyTorch's initialization, one backward pass through everything,
default AdamW, no weight average. First both take turns to measure their speed, which sets the
number of images that fit into the minutes. Then each run has its own
process: seconds, peak memory above that before the run, and PSNR, SSIM and EfficientNet distance of
52 held-out 128-pixel tiles. Writes benchmarks/DEVICE/equal_time.json.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarking import command_line, cpu_seconds, result_file, save, version

from latentae.data.builtin import HELD_OUT, TRAINING, write_photo_tiles
from latentae.data.shards import shards as write_shards
from latentae.data.transforms import to_float, to_uint8
from latentae.losses.objective import Objective
from latentae.measures.metrics import psnr, ssim
from latentae.models.config import build as build_model
from latentae.training.launch import build_accelerator
from latentae.training.optim import learning_rate_scale
from latentae.training.recipe import Recipe, load_recipe
from latentae.training.steps import Trainer
from latentae.training.training_data import build_loader, held_out_batches

ARMS = ("diffusers", "latentae")
Step = Callable[[torch.Tensor], object]


class PlainLoop:
    """A correct, plain training step on diffusers' class."""

    def __init__(self, recipe: Recipe) -> None:
        import diffusers

        torch.manual_seed(recipe.seed)
        values = recipe.autoencoder_config().diffusers_dict()
        self.vae: Any = diffusers.AutoencoderKL(**{k: v for k, v in values.items() if not k.startswith("_")})  # pyright: ignore
        o = recipe.optimizer
        self.recipe, self.seen = recipe, 0
        self.objective = Objective(recipe.loss, recipe.autoencoder_config().latent_channels)
        rates: dict[str, Any] = {"lr": o.lr, "betas": o.betas, "weight_decay": o.weight_decay}
        self.optimizer = torch.optim.AdamW(self.vae.parameters(), **rates)

    def __call__(self, batch: torch.Tensor) -> None:
        """One optimizer step on uint8 images [B, 3, H, W]."""
        recipe, images = self.recipe, to_float(batch)
        scale = learning_rate_scale(recipe.optimizer, self.seen, recipe.images)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.optimizer.lr * scale
        posterior = self.vae.encode(images).latent_dist
        reconstruction = self.vae.decode(posterior.sample()).sample
        loss = self.objective.image_terms(reconstruction, images).total
        loss = loss + recipe.loss.kl * posterior.kl().mean() / images[0].numel()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), recipe.optimizer.max_grad_norm)
        self.optimizer.step()
        self.seen += len(images)

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights to evaluate."""
        return self.vae.state_dict()


class OurLoop:
    """latentae's step."""

    def __init__(self, recipe: Recipe) -> None:
        self.trainer = Trainer(recipe, build_accelerator("fp32"))

    def __call__(self, batch: torch.Tensor) -> None:
        """One optimizer step on uint8 images [B, 3, H, W]."""
        self.trainer.update([batch])

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights to evaluate: the average."""
        return self.trainer.ema.state_dict()


def build(arm: str, recipe: Recipe) -> PlainLoop | OurLoop:
    return PlainLoop(recipe) if arm == "diffusers" else OurLoop(recipe)


def prepare_photos(home: Path) -> None:
    """The quickstart's photos as shards: overlapping training tiles and adjacent held-out tiles."""
    for split, names, size, stride in (("training", TRAINING, 256, 128), ("held-out", HELD_OUT, 128, 128)):
        write_photo_tiles(home / f"{split}-photos", names, size, stride)
        write_shards(home / f"{split}-photos", home / split, shard_size=100)


def recipe_on(home: Path, name: str, **overrides: Any) -> Recipe:
    data = {"data.shards": str(home / "training"), "data.validation": str(home / "held-out")}
    return load_recipe(name, {**data, "precision": "fp32", **overrides})


@torch.inference_mode()
def quality(recipe: Recipe, weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means over the held-out tiles, reconstructed from the mean by latentae's class."""
    model = build_model(recipe.autoencoder_config())
    model.load_state_dict(weights)
    model.eval()
    objective = Objective(recipe.loss, recipe.autoencoder_config().latent_channels)
    columns: dict[str, list[torch.Tensor]] = {"psnr": [], "ssim": [], "perceptual": []}
    for batch in held_out_batches(recipe.data.model_copy(update={"resolution": 128}), 8, 1000):
        made = to_uint8(model(to_float(batch.images), sample_posterior=False).reconstruction)
        columns["psnr"].append(psnr(batch.images, made))
        columns["ssim"].append(ssim(batch.images, made))
        assert objective.perceptual is not None
        columns["perceptual"].append(objective.perceptual(to_float(batch.images), to_float(made)))
    return {name: torch.cat(parts).double().mean().item() for name, parts in columns.items()}


def run_arm(options: argparse.Namespace) -> None:
    """One run in this process; prints its results as JSON."""
    recipe = recipe_on(options.home, options.recipe, seed=options.seeds[0], images=options.images)
    loop = build(options.arm, recipe)
    batches = iter(build_loader(recipe, build_accelerator("fp32")))
    before, start, cpu = _reset_peak(), time.perf_counter(), time.process_time()
    for _ in range(math.ceil(recipe.images / recipe.batch_size)):
        loop(next(batches).images)
    figures = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mb": _peak_mb() - before,
    }
    print(json.dumps(figures | quality(recipe, loop.weights())))


def _reset_peak() -> float:
    """Reset the peak memory and return the current MB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_mb()


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1.024e-3  # pyright: ignore[reportOptionalSubscript]


def measure(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    recipe = recipe_on(home, options.recipe)
    batches = iter(build_loader(recipe, build_accelerator("fp32")))
    batch = next(batches).images
    loops = {arm: build(arm, recipe) for arm in ARMS}
    steps = {arm: (lambda loop=loop: loop(batch)) for arm, loop in loops.items()}
    seconds = cpu_seconds(steps, options.repeats, warmup=5)
    images = {arm: round(60 * options.minutes / s) * recipe.batch_size for arm, s in seconds.items()}
    print({arm: f"{recipe.batch_size / s:.1f} img/s" for arm, s in seconds.items()}, flush=True)
    rows = []
    for index, seed in enumerate(options.seeds):
        for arm in ARMS if index % 2 == 0 else ARMS[::-1]:
            command = [sys.executable, __file__, "--arm", arm, "--seeds", str(seed)]
            command += ["--images", str(images[arm]), "--home", str(home), "--recipe", options.recipe]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = {"arm": arm, "seed": seed, "images": images[arm]}
            rows.append(row | json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)

    def medians(arm: str) -> dict[str, float]:
        names = ("psnr", "ssim", "perceptual", "peak_mb")
        return {name: statistics.median(row[name] for row in rows if row["arm"] == arm) for name in names}

    return {
        "diffusers": version("diffusers"),
        "recipe": options.recipe,
        "minutes": options.minutes,
        "images_per_second": {arm: recipe.batch_size / s for arm, s in seconds.items()},
        "speed_ratio": seconds["diffusers"] / seconds["latentae"],
        "medians": {arm: medians(arm) for arm in ARMS},
        "rows": rows,
    }


def main() -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add(
        "--recipe",
        default="tiny-cpu",
        help="shipped recipe or TOML file with the efficientnet-lite0 distance",
    )
    add("--minutes", type=float, default=3.0, help="minutes of training per run")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each variant per seed")
    add("--repeats", type=int, default=60, help="timed steps of each variant before the runs")
    add("--arm", choices=ARMS, help=argparse.SUPPRESS)  # one run, in the process started for it
    add("--images", type=int, help=argparse.SUPPRESS)
    add("--home", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        run_arm(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare_photos(Path(folder))
        result = measure(options, Path(folder))
    print(f"{result['speed_ratio']:.2f}x the images per second; medians {result['medians']}")
    device = torch.device("cpu")
    save(options.out or result_file(device, "equal_time"), device, result)


if __name__ == "__main__":
    main()

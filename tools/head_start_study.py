"""Quality on held-out photos against CPU minutes, for a start at PCA, other starts, and ways to
train from it.

    python tools/head_start_study.py [--minutes 1] [--seeds 0 1 2] [--factors 8 16 32] [--arms ...]

A run is one process with one thread. Its clock is CPU time and starts before PCA is fitted. Crops,
batch, losses and optimizer are those of the recipe dc-tiny (AdamW at f16 and f32, with narrow
presets), with a constant rate, so that no schedule depends on the time limit. The averaged weights
are evaluated on 52 tiles of 128 pixels of three photos that are not trained on. Two runs are active
at a time.

The file is written after each run; run the same command again to resume. With --plot the figure of
docs/deep_compression.md is drawn from the file. Writes benchmarks/DEVICE/head_start.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from benchmarking import about, command_line, result_file, write_json
from equal_time import prepare_photos

from latentae.data.transforms import to_float, to_uint8
from latentae.evaluation.diffusability.flow import fit_flow
from latentae.evaluation.diffusability.latents import Latents, Whitening
from latentae.losses.objective import Objective
from latentae.measures.metrics import psnr
from latentae.models.config import build
from latentae.training.init import fit_head_start, take_head_start
from latentae.training.launch import build_accelerator
from latentae.training.recipe import Recipe, load_recipe
from latentae.training.steps import Trainer
from latentae.training.training_data import build_loader, held_out_batches

# orthogonalizing wide matrices takes most of a step on one core
ADAMW = {"optimizer.name": "adamw", "optimizer.lr": 1e-3, "optimizer.trunk_lr_ratio": 0.015}
NARROW = {"model.layers_per_block": 1, **ADAMW}
SHAPES: dict[int, dict[str, Any]] = {
    8: {},
    16: {"model.preset": "dc-f16", "model.block_out_channels": [24, 48, 96, 192, 192], **NARROW},
    32: {
        "model.preset": "dc-f32-z32",
        "model.block_out_channels": [24, 48, 96, 192, 192, 192],
        "data.resolution": 128,
        "batch_size": 4,
        **NARROW,
    },
}
PLAIN = {"optimizer.trunk_lr_ratio": 1.0}
GAN = {
    "loss.adversarial.weight": 0.02,
    "loss.adversarial.start_images": 0,
    "loss.adversarial.channels": 32,
    "loss.adversarial.layers": 2,
}
ARMS: dict[str, dict[str, Any]] = {
    "pca": {},
    "linear": {**PLAIN, "model.initialization": "linear"},
    "torch": {**PLAIN, "model.initialization": "torch"},
    "pca, adversarial": GAN,
    "linear, adversarial": {**PLAIN, "model.initialization": "linear", **GAN},
    "pca, trunk frozen": {"optimizer.trunk_lr_ratio": 0.0},
    "pca, trunk at full rate": PLAIN,
    "pca, trunk frozen for the first half": {},
    "pca, no perceptual loss": {"loss.perceptual.net": "none"},
}
MAIN = ("pca", "linear", "torch")
POINTS = 5
FLOW_STEPS, FLOW_BATCH = 400, 16


def recipe_of(home: Path, factor: int, arm: str, seed: int) -> Recipe:
    values = {"data.shards": str(home / "training"), "data.validation": str(home / "held-out")}
    values |= {"data.workers": 0, "seed": seed, "precision": "fp32", "images": 10**9}
    values |= {"optimizer.schedule": "constant"}
    return load_recipe("dc-tiny", {**values, **SHAPES[factor], **ARMS[arm]})


class Evaluator:
    """Mean PSNR and perceptual distance over the held-out tiles."""

    def __init__(self, recipe: Recipe) -> None:
        self.batches = held_out_batches(recipe.data.model_copy(update={"resolution": 128}), 8, 1000)
        channels = recipe.autoencoder_config().latent_channels
        self.distance = Objective(load_recipe("dc-tiny").loss, channels).perceptual

    @torch.inference_mode()
    def __call__(self, reconstruct: Any) -> dict[str, float]:
        """Evaluate a function from uint8 images to uint8 images."""
        pairs = [(batch.images, reconstruct(batch.images)) for batch in self.batches]
        assert self.distance is not None
        distances = [self.distance(to_float(a), to_float(b)) for a, b in pairs]
        return {
            "psnr": torch.cat([psnr(a, b) for a, b in pairs]).mean().item(),
            "perceptual": torch.cat(distances).mean().item(),
        }


def averaged(trainer: Trainer) -> Any:
    model = build(trainer.raw_autoencoder.config)
    model.load_state_dict(trainer.ema.state_dict())
    return model.eval()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One run in this process."""
    torch.set_num_threads(1)
    factor, arm = options.factors[0], options.arms[0]
    recipe = recipe_of(options.home, factor, arm, options.seeds[0])
    judge, accelerator = Evaluator(recipe), build_accelerator("fp32")
    begin = time.process_time()
    trainer = Trainer(recipe, accelerator)
    take_head_start(trainer, [])
    rate, staged = trainer.peak_lr.get("autoencoder-trunk", 0.0), "first half" in arm
    if staged:
        trainer.peak_lr["autoencoder-trunk"] = 0.0
    spent, curve, seconds = time.process_time() - begin, [], 60 * options.minutes
    head_start_seconds = spent
    curve.append({"minutes": spent / 60, "images": 0, **judge(_reconstruct(averaged(trainer)))})
    batches = iter(build_loader(recipe, accelerator))
    while spent < seconds:
        begin = time.process_time()
        trainer.update([next(batches).images])
        spent += time.process_time() - begin
        if staged and spent > seconds / 2:
            trainer.peak_lr["autoencoder-trunk"] = rate
        if spent >= seconds * len(curve) / POINTS:
            figures = judge(_reconstruct(averaged(trainer)))
            curve.append({"minutes": spent / 60, "images": trainer.state.images_seen, **figures})
    model = averaged(trainer)
    row: dict[str, Any] = {"factor": factor, "arm": arm, "seed": options.seeds[0]}
    row |= {"start_seconds": head_start_seconds, "curve": curve}
    row["pca_likeness"], row["flow_loss"] = latent_figures(recipe, model, judge)
    return row


@torch.inference_mode()
def latent_figures(recipe: Recipe, model: Any, judge: Evaluator) -> tuple[float, float | None]:
    """Linear share of PCA's components in the latent's variance, and a tiny flow's loss."""
    pca = fit_head_start(load_recipe(recipe, {"model.initialization": "pca"})).pca
    z, components = [], []
    for batch in judge.batches:
        z.append(model.encode(to_float(batch.images)).mode())
        components.append(pca.encode(batch.images).float())
    latents, known = torch.cat(z), torch.cat(components)
    y, x = (t.movedim(1, -1).flatten(0, 2).double() for t in (latents, known))
    y, x = y - y.mean(0), torch.cat([x - x.mean(0)], 1)
    left = y - x @ torch.linalg.lstsq(x, y).solution
    likeness = (1 - left.square().sum(0) / y.square().sum(0)).mean().item()
    training = build_loader(recipe, build_accelerator("fp32"))
    batches = islice(training, 512 // recipe.batch_size)
    flat = torch.cat([model.encode(to_float(batch.images)).mode() for batch in batches])
    means, names = tuple(flat), tuple(map(str, range(len(flat))))
    fitted = Latents(names, means, tuple(map(torch.zeros_like, means)), None, len(means))
    whitening = Whitening(flat.mean((0, 2, 3))[:, None, None], flat.std((0, 2, 3))[:, None, None])
    return likeness, fit_flow(fitted, whitening, steps=FLOW_STEPS, batch=FLOW_BATCH, seed=0).loss


def _reconstruct(model: Any) -> Any:
    return lambda images: to_uint8(model(to_float(images), sample_posterior=False).reconstruction)


def baseline(home: Path, factor: int) -> dict[str, float]:
    """PCA itself."""
    recipe = recipe_of(home, factor, "pca", 0)
    return Evaluator(recipe)(fit_head_start(recipe).pca.reconstruct)


def measure(options: argparse.Namespace, home: Path, out: Path) -> None:
    """Start all runs that `out` lacks and write it after each."""
    pca = {f"f{factor}": baseline(home, factor) for factor in options.factors}
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    finished = {(row["factor"], row["arm"], row["seed"]) for row in rows}
    jobs = [
        (f, arm, seed)
        for arm in options.arms
        for f in options.factors
        for seed in options.seeds
        if f == 8 or arm in MAIN[:2]
    ]

    def one(job: tuple[int, str, int]) -> dict[str, Any]:
        factor, arm, seed = job
        command = [sys.executable, __file__, "--one", "--home", str(home), "--minutes", str(options.minutes)]
        command += ["--factors", str(factor), "--arms", arm, "--seeds", str(seed)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:
        for done in as_completed([pool.submit(one, job) for job in jobs if job not in finished]):
            row = done.result()
            rows.append(row)
            curve = row["curve"]
            print(f"f{row['factor']} {row['arm']}, {row['seed']}: {curve[0]} -> {curve[-1]}", flush=True)
            figures = {"minutes": options.minutes, "pca": pca, "medians": medians(rows), "rows": rows}
            write_json(out, {**about(torch.device("cpu")), **figures})


def medians(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Over the seeds of each arm: results at the start and the end, and the lowest PSNR between."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["factor"], row["arm"])):
        curve = row["curve"]
        figures = {"start_psnr": curve[0]["psnr"], "start_perceptual": curve[0]["perceptual"]}
        figures |= {"lowest_psnr": min(point["psnr"] for point in curve)}
        figures |= {name: curve[-1][name] for name in ("psnr", "perceptual", "images")}
        figures |= {"pca_likeness": row["pca_likeness"], "flow_loss": row["flow_loss"] or float("inf")}
        groups.setdefault(f"f{row['factor']}, {row['arm']}", []).append(figures)
    return {
        name: {"seeds": len(found)}
        | {key: statistics.median(each[key] for each in found) for key in found[0]}
        for name, found in groups.items()
    }


def plot(result: dict[str, Any], out: Path) -> None:
    """Draw PSNR and distance against minutes, one column per factor, one line per run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    factors = sorted({row["factor"] for row in result["rows"]})
    colors = dict(zip(MAIN, ("tab:blue", "tab:orange", "tab:gray"), strict=True))
    size = (4 * len(factors), 6)
    figure, axes = plt.subplots(
        2, len(factors), figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    first_seed = min(row["seed"] for row in result["rows"])
    dashed: dict[str, Any] = {"color": "black", "linewidth": 0.8, "linestyle": "--", "label": "PCA itself"}
    for column, factor in enumerate(factors):
        for row, key in enumerate(("psnr", "perceptual")):
            axis = axes[row][column]
            axis.axhline(result["pca"][f"f{factor}"][key], **dashed)
            for one in (r for r in result["rows"] if r["factor"] == factor and r["arm"] in MAIN):
                xs, ys = zip(*((p["minutes"], p[key]) for p in one["curve"]), strict=True)
                label = f"start: {one['arm']}" if one["seed"] == first_seed else None
                axis.plot(xs, ys, color=colors[one["arm"]], linewidth=1.2, label=label)
        axes[0][column].set_title(f"f{factor} z{16 if factor == 8 else 32}")
        axes[1][column].set_xlabel("CPU minutes of one core")
    axes[0][0].set_ylabel("PSNR, dB (higher is better)")
    axes[1][0].set_ylabel("EfficientNet distance (lower is better)")
    axes[0][0].legend()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=1.0, help="CPU minutes of each run")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each arm per seed")
    add("--factors", type=int, nargs="+", default=[8, 16, 32], choices=SHAPES, help="downsampling factors")
    add("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="starts; above f8 only the first two run")
    add("--plot", type=Path, metavar="PNG", help="only draw the figure from --out")
    add("--one", action="store_true", help=argparse.SUPPRESS)  # one run, in the process started for it
    add("--home", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options)))
        return
    out = options.out or result_file(torch.device("cpu"), "head_start")
    if options.plot:
        plot(json.loads(out.read_text(encoding="utf-8")), options.plot)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare_photos(Path(folder))
        measure(options, Path(folder), out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()

"""The verb `train`: from a recipe and shards to a run folder."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentae.data.folder import find_images
from latentae.data.index import load_index
from latentae.data.loader import TrainLoader
from latentae.data.shards import expand_shards
from latentae.data.streaming import StreamLoader, streams
from latentae.data.writing import BAD_SAMPLES
from latentae.data.writing import shards as write_shards
from latentae.errors import DataError, OutputError, RecipeError, TrainingError
from latentae.files import write_text
from latentae.jobs import RECORD, Job
from latentae.progress import say
from latentae.training.checkpoint import find_checkpoint, load_checkpoint
from latentae.training.launch import build_accelerator, close_accelerator, on_main
from latentae.training.loop import run_loop
from latentae.training.recipe import Recipe, load_recipe
from latentae.training.reporting import MetricsLog
from latentae.training.steps import Trainer
from latentae.training.validation import Validation, held_out_batches

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["measure_speed", "train"]


def train(recipe: str | Path | Recipe, output: str | Path, *, resume: str | Path = "auto", **overrides: Any) -> Path:
    """Train an autoencoder; run again, it goes on where it stopped.

    Args:
        recipe: a shipped recipe's name, a TOML path, or a Recipe.
        output: the run folder.
        resume: "auto" (go on if `output` holds this run), "never" (refuse a folder that holds a run), or the path of a run or
            checkpoint to go on from in a new folder.
        **overrides: options of the recipe: `images=1000`, `data={"shards": "photos"}`, `**{"optimizer.lr": 1e-3}`.

    Returns:
        The run folder.

    Raises:
        RecipeError, DataError, OutputError, ModelError, WeightsError, TrainingError: one line each, nothing half-written.
        Interrupted: stopped by a signal, after the state was saved.
    """
    resolved, run = load_recipe(recipe, overrides), Path(output)
    accelerator = build_accelerator(resolved.precision)
    try:
        resolved = on_main(accelerator, lambda: _prepare_data(resolved, run))
        inputs = _inputs(resolved)
        if on_main(accelerator, lambda: _already_finished(run, inputs, str(resume))):
            say(f"{run} is finished: {resolved.images} images seen; nothing to do")
            return run
        _train(resolved, run, inputs, resume, accelerator)
    finally:
        close_accelerator(accelerator)
    return run


def _prepare_data(recipe: Recipe, run: Path) -> Recipe:
    """Make shards first where the data is a folder of images; returns the recipe with shards in it."""
    shards = recipe.data.shards
    if shards is None:
        raise RecipeError("no training data: give --data.shards SHARDS (or a folder of images)")
    if not Path(shards).is_dir() or any(Path(shards).glob("*.tar")):
        return recipe
    try:
        find_images(shards)
    except DataError as error:
        raise DataError(f"data.shards: {shards} holds neither .tar shards nor images; name a folder of either") from error
    made = run.with_name(run.name + "-shards")
    write_shards(shards, made)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"shards": str(made)})})


def _inputs(recipe: Recipe) -> dict[str, Any]:
    """What makes two runs the same job: the recipe's identity and the data's digest."""
    paths = expand_shards(str(recipe.data.shards))
    digest = "" if streams(paths, recipe.data.index) else load_index(paths, recipe.data.index).digest
    return {"recipe": recipe.identity(), "data_digest": digest}


def _already_finished(run: Path, inputs: dict[str, Any], resume: str) -> bool:
    """Refuse a folder that holds something else, before any heavy work."""
    if not run.is_dir() or not any(run.iterdir()):
        return False
    if resume == "never":
        raise OutputError(f"{run} is not empty and --resume is never; choose another output")
    if resume != "auto" and (run / RECORD).exists():
        raise OutputError(f"{run} already holds a run; --resume PATH begins a new one, so choose an empty output")
    return Job.open(run, "train", inputs).state == "finished"


def _train(recipe: Recipe, run: Path, inputs: dict[str, Any], resume: str | Path, accelerator: Accelerator) -> None:
    loader = build_loader(recipe, accelerator, run / BAD_SAMPLES)
    validation = Validation(held_out_batches(recipe.data, recipe.batch_size, recipe.log.validation_images))
    trainer = Trainer(recipe, accelerator)
    _check_resolution(recipe, trainer)
    start = find_checkpoint(run if resume in ("auto", "never") else Path(resume))
    if start is None and resume not in ("auto", "never"):
        raise TrainingError(f"--resume {resume} holds no checkpoint; give a run folder or one of its checkpoints")
    if start is not None:
        loader.load_state_dict(load_checkpoint(trainer, start))
    job = on_main(accelerator, lambda: Job.open(run, "train", inputs))
    if accelerator.is_main_process:
        write_text(run / "recipe.toml", recipe.toml())
        _announce(recipe, trainer, loader, validation, start)
        log = MetricsLog(run, trainer.state.step, recipe.log.tensorboard)
    else:
        log = None
    with log or nullcontext():
        run_loop(trainer, loader, run, validation, log)
    on_main(accelerator, lambda: job.finish(images_seen=trainer.state.images_seen, steps=trainer.state.step))


def build_loader(recipe: Recipe, accelerator: Accelerator, bad_log: Path | None = None) -> TrainLoader | StreamLoader:
    """This process's share of the data: in exact order, or streamed from remote shards that have no index.

    Raises:
        RecipeError: the global batch does not divide over processes and accumulation steps.
    """
    parts = accelerator.num_processes * recipe.gradient_accumulation
    if recipe.batch_size % parts:
        raise RecipeError(
            f"batch_size {recipe.batch_size} does not divide over {accelerator.num_processes} processes x "
            f"{recipe.gradient_accumulation} accumulation steps; use a multiple of {parts}"
        )
    rank, world_size = accelerator.process_index, accelerator.num_processes
    if streams(expand_shards(str(recipe.data.shards)), recipe.data.index):
        return StreamLoader(recipe.data, recipe.batch_size // world_size, recipe.seed, rank)
    return TrainLoader(recipe.data, recipe.batch_size // world_size, recipe.seed, rank, world_size, bad_log)


def _check_resolution(recipe: Recipe, trainer: Trainer) -> None:
    resolution, f = recipe.data.resolution, trainer.raw_autoencoder.config.downsampling
    if resolution % f:
        raise RecipeError(
            f"data.resolution {resolution} is not a multiple of the model's downsampling {f}; use {resolution // f * f or f}"
        )
    for part in (trainer.raw_discriminator, trainer.objective.perceptual):
        if part is not None and resolution < part.minimum_size:
            raise RecipeError(
                f"data.resolution {resolution} is below the {part.minimum_size} pixels that {type(part).__name__} needs"
            )


def _announce(
    recipe: Recipe, trainer: Trainer, loader: TrainLoader | StreamLoader, validation: Validation, start: Path | None
) -> None:
    a, config = trainer.accelerator, trainer.raw_autoencoder.config
    size = sum(p.numel() for p in trainer.raw_autoencoder.parameters())
    f, z, r = config.downsampling, config.latent_channels, recipe.data.resolution
    say(f"model: {size / 1e6:.2f} M parameters, f{f} z{z}: {r} x {r} x 3 -> {r // f} x {r // f} x {z}")
    loader.announce()
    say(f"validation: {sum(len(b.keys) for b in validation.batches)} held-out images")
    weights = ", ".join(f"{name} {weight:g}" for name, weight in trainer.objective.effective_weights().items())
    say(f"loss weights per image element: {weights}")
    say(
        f"{a.num_processes} process(es) on {a.device.type}, {a.mixed_precision.replace('no', 'fp32')}, global batch {recipe.batch_size}"
    )
    if start is not None:
        say(f"resuming {start} at image {trainer.state.images_seen} of {recipe.images}")


def measure_speed(recipe: Recipe, seconds: float = 8.0, warmup_steps: int = 2) -> float:
    """Images per second that training this recipe reaches here, from real steps on its data, which are then thrown away.

    Args:
        recipe: with its data in place; a discriminator, if any, takes part from the first step.
        seconds: how long to measure, after the warm-up.
        warmup_steps: steps that do not count.
    """
    import time

    adversarial = recipe.loss.adversarial.model_copy(update={"start_images": 0})
    recipe = recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"adversarial": adversarial})})
    accelerator = build_accelerator(recipe.precision)
    try:
        trainer, batches = Trainer(recipe, accelerator), iter(build_loader(recipe, accelerator))
        start, steps = time.monotonic(), -warmup_steps
        while steps < 3 or time.monotonic() - start < seconds:
            trainer.update(next(batches).images.chunk(recipe.gradient_accumulation))
            if (steps := steps + 1) == 0:
                start = time.monotonic()
        if accelerator.device.type == "cuda":
            float(next(trainer.raw_autoencoder.parameters()).sum())  # the device may still be working
        return steps * recipe.batch_size / (time.monotonic() - start)
    finally:
        close_accelerator(accelerator)

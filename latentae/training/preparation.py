"""What a recipe needs of the world before a step can be taken: its data as shards, this process's share of them, sizes that fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentae.data.builtin import is_builtin
from latentae.data.folder import find_images
from latentae.data.loader import TrainLoader
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import load_index
from latentae.data.shards import shards as write_shards
from latentae.data.streaming import StreamLoader, streams
from latentae.errors import DataError, RecipeError
from latentae.models.initialization import load_initial
from latentae.training.recipe import Recipe
from latentae.training.steps import Trainer
from latentae.training.validation import Validation, held_out_batches

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["build_loader", "build_validation", "check_sizes", "job_inputs", "make_shards"]


def make_shards(recipe: Recipe, run: Path) -> Recipe:
    """Make shards beside the run where data is a folder of images or built-in; returns the recipe with shards in it.

    Raises:
        RecipeError: no data is named.
        DataError: a folder holds neither shards nor images.
    """
    if recipe.data.shards is None and not all(
        "shards" in phase.get("data", {}) for phase in recipe.phases or [{}]
    ):
        raise RecipeError("no training data: give --data.shards SHARDS (or a folder of images)")
    named = recipe.data.model_dump(include={"shards", "validation", "max_pixels"})
    data = recipe.data.model_copy(update=_with_shards(named, run, ""))
    phases = []
    for index, phase in enumerate(recipe.phases):
        changed = _with_shards(
            {"max_pixels": recipe.data.max_pixels, **phase["data"]} if "data" in phase else {},
            run,
            f"-{index}",
        )
        phases.append({**phase, "data": changed} if changed else phase)
    return recipe.model_copy(update={"data": data, "phases": tuple(phases)})


def _with_shards(data: dict[str, Any], run: Path, suffix: str) -> dict[str, Any]:
    """A `[data]` table that names shards where it named images: only built-in ones for validation, which takes slices and none, too."""
    changed = dict(data)
    if "shards" in data:
        changed["shards"] = _as_shards(
            data["shards"], data["max_pixels"], run.with_name(f"{run.name}-shards{suffix}")
        )
    if is_builtin(data.get("validation", "")):
        changed["validation"] = _as_shards(
            data["validation"], data["max_pixels"], run.with_name(f"{run.name}-held-out-shards{suffix}")
        )
    return changed


def _as_shards(shards: str | None, max_pixels: int, made: Path) -> str | None:
    if shards is not None and is_builtin(shards):
        write_shards(shards, made)
        return str(made)
    if shards is None or not Path(shards).is_dir() or any(Path(shards).glob("*.tar")):
        return shards
    try:
        find_images(shards)
    except DataError as error:
        raise DataError(f"data.shards: {shards} holds no .tar shards; {error}") from error
    write_shards(shards, made, max_pixels=max_pixels)
    return str(made)


def job_inputs(recipe: Recipe) -> dict[str, Any]:
    """What makes two runs the same job: the recipe's identity, the data's digest and that of the weights it begins with."""
    digests = []
    for phase in recipe.phase_recipes():
        paths = expand_shards(str(phase.data.shards))
        streamed = streams(paths, phase.data.index)  # then nothing is known of them but where they lie
        digests.append(
            f"streamed: {phase.data.shards}" if streamed else load_index(paths, phase.data.index).digest
        )
    inputs: dict[str, Any] = {"recipe": recipe.identity(), "data_digest": digests[0]}
    if len(set(digests)) > 1:
        inputs["phase_data_digests"] = digests
    if recipe.model.init_from is not None:
        inputs["init_fingerprint"] = load_initial(recipe.model.init_from).fingerprint
    return inputs


def build_loader(
    recipe: Recipe, accelerator: Accelerator, bad_log: Path | None = None
) -> TrainLoader | StreamLoader:
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


def build_validation(recipe: Recipe, accelerator: Accelerator) -> Validation:
    """The held-out images of a phase, in batches no larger than what one step holds on one device."""
    size = recipe.batch_size // (accelerator.num_processes * recipe.gradient_accumulation)
    return Validation(held_out_batches(recipe.data, max(1, size), recipe.log.validation_images))


def check_sizes(recipe: Recipe, trainer: Trainer) -> None:
    """Check that model, discriminator and losses can take the recipe's images.

    Raises:
        RecipeError: the resolution does not divide, or is too small.
    """
    resolution, f = recipe.data.resolution, trainer.raw_autoencoder.config.downsampling
    if resolution % f:
        raise RecipeError(
            f"data.resolution {resolution} is not a multiple of the model's downsampling {f}; use {resolution // f * f or f}"
        )
    discriminator: Any = trainer.raw_discriminator
    needed = {"the feature network of a loss": trainer.objective.minimum_size}
    if discriminator is not None:
        needed["the discriminator"] = discriminator.minimum_size
    equivariance = recipe.loss.equivariance
    shrunk = min(equivariance.smallest_scale if equivariance.probability else 1.0, 1.0)
    if equivariance.downscaled:
        shrunk = min(shrunk, 1.0 / max(equivariance.factors))
    smallest = max(round(shrunk * resolution / f), 1) * f
    for name, size in needed.items():
        if smallest < size:
            where = f"data.resolution {resolution}" + (
                f", shrunk to {smallest} by loss.equivariance," if shrunk < 1 else ""
            )
            raise RecipeError(f"{where} is below the {size} pixels that {name} needs")

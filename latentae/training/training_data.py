"""The data of a run: packed shards, the job's identity, loaders, and held-out images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentae.data.builtin import is_builtin
from latentae.data.folder import find_images
from latentae.data.loader import Batch, TrainLoader, image_batches
from latentae.data.options import DataOptions
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import load_index
from latentae.data.shards import shards as write_shards
from latentae.data.streaming import StreamLoader, streams
from latentae.errors import DataError, RecipeError
from latentae.models.initialization import load_initial
from latentae.progress import say
from latentae.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["LARGEST_BATCH", "NO_DATA", "build_loader", "held_out_batches", "job_inputs", "make_shards"]

NO_DATA = "no training data: give --data.shards SHARDS (or a folder of images)"
LARGEST_BATCH = 8  # one process validates, and a global batch may be too large for it


def make_shards(recipe: Recipe, run: Path) -> Recipe:
    """Write shards next to the run if data is a folder of images or built-in.

    Returns the recipe with these shards.

    Raises:
        RecipeError: the recipe names no data.
        DataError: a folder has neither shards nor images.
    """
    of_phases = [phase.get("data", {}) for phase in recipe.phases]
    if recipe.data.shards is None and not (of_phases and all("shards" in data for data in of_phases)):
        raise RecipeError(NO_DATA)
    named = recipe.data.model_dump(include={"shards", "validation", "max_pixels"})
    data = recipe.data.model_copy(update=_with_shards(named, run, ""))
    limit, phases = {"max_pixels": recipe.data.max_pixels}, []
    for index, phase in enumerate(recipe.phases):
        own = _with_shards({**limit, **phase["data"]}, run, f"-{index}") if "data" in phase else {}
        phases.append({**phase, "data": own} if own else phase)
    return recipe.model_copy(update={"data": data, "phases": tuple(phases)})


def _with_shards(data: dict[str, Any], run: Path, suffix: str) -> dict[str, Any]:
    """A `[data]` table with shards instead of images.

    For validation only built-in images are packed.
    """
    changed = dict(data)
    if "shards" in data:
        out = run.with_name(f"{run.name}-shards{suffix}")
        changed["shards"] = _as_shards(data["shards"], data["max_pixels"], out)
    if is_builtin(data.get("validation", "")):
        out = run.with_name(f"{run.name}-held-out-shards{suffix}")
        changed["validation"] = _as_shards(data["validation"], data["max_pixels"], out)
    return changed


def _as_shards(shards: str | None, max_pixels: int, out: Path) -> str | None:
    if shards is not None and is_builtin(shards):
        write_shards(shards, out)
        return str(out)
    if shards is None or not Path(shards).is_dir() or any(Path(shards).glob("*.tar")):
        return shards
    try:
        find_images(shards)
    except DataError as error:
        raise DataError(f"data.shards: {shards} has no .tar shards; {error}") from error
    write_shards(shards, out, max_pixels=max_pixels)
    return str(out)


def job_inputs(recipe: Recipe) -> dict[str, Any]:
    """The identity of a run: its recipe, and the digests of its data and initial weights."""
    digests = []
    for phase in recipe.phase_recipes():
        paths = expand_shards(str(phase.data.shards))
        streamed = streams(paths, phase.data.index)  # then only the address is known
        named = f"streamed: {phase.data.shards}"
        digests.append(named if streamed else load_index(paths, phase.data.index).digest)
    inputs: dict[str, Any] = {"recipe": recipe.identity(), "data_digest": digests[0]}
    if len(set(digests)) > 1:
        inputs["phase_data_digests"] = digests
    if recipe.model.init_from is not None:
        inputs["init_fingerprint"] = load_initial(recipe.model.init_from).fingerprint
    return inputs


def build_loader(
    recipe: Recipe, accelerator: Accelerator, bad_log: Path | None = None
) -> TrainLoader | StreamLoader:
    """This process's share of the data, in exact order if shards have an index.

    Raises:
        RecipeError: the global batch is not divisible by processes and accumulation steps.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    parts = world_size * recipe.gradient_accumulation
    if recipe.batch_size % parts:
        raise RecipeError(
            f"batch_size is {recipe.batch_size}, but it must be divisible by {world_size} processes x "
            f"{recipe.gradient_accumulation} accumulation steps; use a multiple of {parts}"
        )
    size = recipe.batch_size // world_size
    if streams(expand_shards(str(recipe.data.shards)), recipe.data.index):
        return StreamLoader(recipe.data, size, recipe.seed, rank)
    return TrainLoader(recipe.data, size, recipe.seed, rank, world_size, bad_log)


def held_out_batches(options: DataOptions, batch_size: int, limit: int) -> list[Batch]:
    """The held-out images of a recipe, resized and center-cropped; empty if there are none.

    Args:
        options: the `[data]` table of the phase.
        batch_size: maximum images per batch; at most `LARGEST_BATCH`.
        limit: images in all.

    Raises:
        DataError: the named shards can't be read.
    """
    if options.validation == "none":
        return []
    auto = options.validation == "auto"
    shards = expand_shards(str(options.shards) if auto else options.validation)
    advice = "name shards with --data.validation"
    if auto and streams(shards, options.index):
        say(f"no validation: remote shards without an index have no held-out slice; {advice}, or index these")
        return []
    batches = list(
        image_batches(
            shards,
            options.resolution,
            min(batch_size, LARGEST_BATCH),
            limit=limit,
            only_held_out=options.validation_fraction if auto else None,
            channels=options.channels,
            index=options.index if auto else None,
            max_pixels=options.max_pixels,
        )
    )
    if not batches:
        say(f"no validation: the held-out slice is empty; {advice}, or raise --data.validation-fraction")
    return batches

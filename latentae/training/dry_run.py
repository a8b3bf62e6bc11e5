"""Dry run: take a few real steps of every phase and extrapolate time and memory.

Nothing is written to the run folder or next to the data. Indexes and packed shards that training
would keep there go to a temporary folder, which has links to the shards and is removed at the end.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentae.data.builtin import BuiltinImages, is_builtin
from latentae.data.folder import ImageFolder
from latentae.data.loader import TrainLoader
from latentae.data.options import DataOptions
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import SUFFIX
from latentae.data.shards import ImageSource, write_shards
from latentae.data.sources import is_remote, name_of
from latentae.data.streaming import StreamLoader
from latentae.errors import RecipeError, TrainingError
from latentae.progress import duration, say
from latentae.training.launch import StopFlag, agree, launched
from latentae.training.loop import Validation
from latentae.training.recipe import Recipe, load_recipe
from latentae.training.reporting import check_wandb, devices, peak_memory_gb
from latentae.training.steps import Trainer
from latentae.training.training_data import LARGEST_BATCH, NO_DATA, build_loader, held_out_batches

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["DryRun", "PartSpeed", "dry_run", "measure_speed"]

FEWEST_STEPS = 3
WARM_UP = 2  # steps that allocate memory and choose or compile kernels
PACKED = 256  # images of a folder that are packed into shards, at least
NEVER = 2**62


@dataclass(frozen=True)
class PartSpeed:
    """Measurements of a part of a phase: before the discriminator starts, or with it.

    Attributes:
        phase: index of the phase, from 0.
        name: number and name of the phase; "all" in a recipe without phases.
        adversarial: whether the discriminator takes part.
        images: images of this part in the run.
        images_per_second: over all processes.
        seconds_a_step: seconds per global batch.
        data_wait: share of the time spent waiting for data, mean over processes.
        memory_gb: peak of the GPU's allocator in this part, or of the process so far on a CPU;
            maximum over processes.
        skipped: measured steps with a non-finite loss or gradient.
    """

    phase: int
    name: str
    adversarial: bool
    images: int
    images_per_second: float
    seconds_a_step: float
    data_wait: float
    memory_gb: float
    skipped: int

    @property
    def seconds(self) -> float:
        """Duration of this part in the run."""
        return self.images / self.images_per_second

    @property
    def title(self) -> str:
        """The name, and whether the discriminator takes part."""
        return f"{self.name}{' + GAN' * self.adversarial}"


@dataclass(frozen=True)
class DryRun:
    """Result of a dry run.

    Attributes:
        parts: in the order of the run.
        validation_seconds: of all validations of the run.
        checkpoint_bytes: of the largest checkpoint, without small files.
        devices: processes, device and precision.
    """

    parts: tuple[PartSpeed, ...]
    validation_seconds: float
    checkpoint_bytes: int
    devices: str

    @property
    def seconds(self) -> float:
        """Duration of the recipe: all phases and validations, without writing checkpoints."""
        return sum(part.seconds for part in self.parts) + self.validation_seconds


def dry_run(recipe: str | Path | Recipe, *, seconds: float = 5.0, **overrides: Any) -> DryRun:
    """Take a few real steps of every phase and print speed, memory, checkpoint size and total time.

    If a discriminator starts later than its phase, the steps before and with it are measured
    separately. Several processes measure together and the first one prints.

    Args:
        recipe: a shipped recipe's name, a TOML path, or a Recipe.
        seconds: time to measure each part after the warm-up, at least a few steps.
        **overrides: options of the recipe, as for `train`.

    Raises:
        RecipeError, DataError, ModelError, WeightsError, MissingDependencyError: as `train` would.
        TrainingError: a phase does not fit the GPU's memory.
        Interrupted: stopped by a signal.
    """
    resolved = load_recipe(recipe, overrides)
    check_wandb(resolved.log)
    with (
        launched(resolved.precision) as accelerator,
        StopFlag(announce=False) as stop,
        stop.at_once("in the dry run"),
        tempfile.TemporaryDirectory(prefix="latentae-dry-run-") as folder,
    ):
        result = _measure_all(_with_shards(resolved, Path(folder)), accelerator, seconds, Path(folder))
        if accelerator.is_main_process:
            _print(resolved, result)
    return result


def measure_speed(recipe: Recipe, seconds: float = 8.0, warmup_steps: int = WARM_UP) -> float:
    """Images per second of training this recipe here, from a few real steps on its data.

    Args:
        recipe: with its data in place; a discriminator takes part from the first step.
        seconds: time to measure, after the warm-up.
        warmup_steps: steps that are not counted.
    """
    recipe = _starting_at(recipe, 0)
    with launched(recipe.precision) as accelerator:
        trainer, loader = Trainer(recipe, accelerator), build_loader(recipe, accelerator)
        steps, elapsed, _ = _measure(trainer, loader, seconds, warmup_steps)
        return steps * recipe.batch_size / elapsed


def _measure_all(recipe: Recipe, accelerator: Accelerator, seconds: float, folder: Path) -> DryRun:
    speeds: list[PartSpeed] = []
    validation_seconds, checkpoint_bytes = 0.0, 0
    for index, phase in enumerate(recipe.phase_recipes()):
        phase = phase.model_copy(update={"data": _linked(phase.data, folder / f"phase-{index}")})
        name = f"{index} {phase.description}" if recipe.phases else "all"
        parts = _parts(phase)
        for part, images in parts:
            with _fits(name):
                trainer = Trainer(part, accelerator)
                trainer.check_resolution()
                if accelerator.is_main_process:
                    say(f"dry run: {name}, {images:,} images{' + GAN' * trainer.adversarial}")
                speeds.append(_speed(trainer, seconds, index, name, images))
                if part is parts[-1][0]:
                    validation_seconds += _validation_seconds(trainer)
                    checkpoint_bytes = max(checkpoint_bytes, _checkpoint_bytes(trainer))
            del trainer
            _free(accelerator)
    return DryRun(tuple(speeds), validation_seconds, checkpoint_bytes, devices(accelerator))


def _parts(phase: Recipe) -> list[tuple[Recipe, int]]:
    """A phase before its discriminator starts and with it, as recipes, and the images of each."""
    game = phase.loss.adversarial
    before = min(game.start_images, phase.images) if game.weight else phase.images
    parts = [(_starting_at(phase, NEVER), before), (_starting_at(phase, 0), phase.images - before)]
    return [(part, images) for part, images in parts if images]


def _starting_at(recipe: Recipe, images: int) -> Recipe:
    """The recipe with another start of its discriminator."""
    adversarial = recipe.loss.adversarial.model_copy(update={"start_images": images})
    return recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"adversarial": adversarial})})


@contextmanager
def _fits(name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"phase {name} does not fit the GPU's memory; raise gradient_accumulation, set "
            "model.gradient_checkpointing, or lower batch_size or data.resolution"
        ) from error


def _free(accelerator: Accelerator) -> None:
    """Free the memory of a part, so that the next one is measured alone."""
    accelerator.free_memory()
    gc.collect()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(accelerator.device)


def _speed(trainer: Trainer, seconds: float, phase: int, name: str, images: int) -> PartSpeed:
    accelerator, recipe = trainer.accelerator, trainer.recipe
    steps, elapsed, waited = _measure(trainer, build_loader(recipe, accelerator), seconds, WARM_UP)
    own = torch.tensor([[waited / elapsed, peak_memory_gb(accelerator.device)]], device=accelerator.device)
    of_all: torch.Tensor = accelerator.gather(own)  # pyright: ignore[reportAssignmentType]
    return PartSpeed(
        phase,
        name,
        trainer.adversarial,
        images,
        images_per_second=steps * recipe.batch_size / elapsed,
        seconds_a_step=elapsed / steps,
        data_wait=of_all[:, 0].mean().item(),
        memory_gb=of_all[:, 1].max().item(),
        skipped=trainer.state.skipped,
    )


def _measure(
    trainer: Trainer, loader: TrainLoader | StreamLoader, seconds: float, warmup_steps: int
) -> tuple[int, float, float]:
    """Steps after the warm-up, their seconds, and the seconds they waited for data.

    All processes take the same number of steps. R1 and R2 are added every few steps; complete
    rounds of these steps are measured.
    """
    accelerator, recipe, game = trainer.accelerator, trainer.recipe, trainer.recipe.loss.adversarial
    round_ = game.penalty_every if trainer.adversarial and (game.r1 or game.r2) else 1
    start, waited, steps = time.monotonic(), 0.0, -warmup_steps
    with closing(iter(loader)) as batches:  # pyright: ignore[reportArgumentType]
        while True:
            if steps == 0:
                _synchronize(accelerator)
                start, waited = time.monotonic(), 0.0
            asked = time.monotonic()
            images = next(batches).images
            waited += time.monotonic() - asked
            trainer.update(images.chunk(recipe.gradient_accumulation))
            steps += 1
            more = steps < FEWEST_STEPS or time.monotonic() - start < seconds
            if not agree(accelerator, more)[0] and steps % round_ == 0:
                _synchronize(accelerator)
                return steps, max(time.monotonic() - start, 1e-9), waited


def _synchronize(accelerator: Accelerator) -> None:
    """Wait for the last step on the device."""
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize(accelerator.device)


def _validation_seconds(trainer: Trainer) -> float:
    """Seconds of all validations of a phase, from one batch on the first process."""
    phase, log, accelerator = trainer.recipe, trainer.recipe.log, trainer.accelerator
    elapsed = 0.0
    if accelerator.is_main_process:
        limit = min(LARGEST_BATCH, log.validation_images)
        batches = held_out_batches(phase.data, phase.batch_size, limit)[:1]
        if batches:
            start = time.monotonic()
            Validation(batches).run(trainer)
            per_image = (time.monotonic() - start) / len(batches[0].keys)
            count = phase.images / (log.validation_every_images or -(-phase.images // 10))
            elapsed = per_image * log.validation_images * math.ceil(count)
    own = torch.tensor([elapsed], device=accelerator.device)
    return accelerator.gather(own).max().item()  # pyright: ignore[reportAttributeAccessIssue]


def _checkpoint_bytes(trainer: Trainer) -> int:
    return sum(_bytes(part.state_dict()) for part in (*trainer.saved.values(), *trainer.optimizers.values()))


def _bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_bytes, children))


def _with_shards(recipe: Recipe, folder: Path) -> Recipe:
    """Pack some evenly spaced images into shards if the data is no shards yet."""
    data = recipe.data
    if data.shards is None:
        raise RecipeError(NO_DATA)
    largest = max(phase.batch_size for phase in recipe.phase_recipes())
    count, changed = max(PACKED, math.ceil(2 * largest / (1 - data.validation_fraction))), {}
    if is_builtin(data.shards):
        changed["shards"] = _packed(BuiltinImages(data.shards), count, folder / "shards")
    elif Path(data.shards).is_dir() and not any(Path(data.shards).glob("*.tar")):
        changed["shards"] = _packed(ImageFolder(Path(data.shards)), count, folder / "shards")
    if is_builtin(data.validation):
        images, count = BuiltinImages(data.validation), recipe.log.validation_images
        changed["validation"] = _packed(images, count, folder / "held-out")
    return recipe.model_copy(update={"data": data.model_copy(update=changed)})


def _packed(images: ImageSource, count: int, out: Path) -> str:
    count = min(len(images.sizes), count)
    numbers = (index * len(images.sizes) // count for index in range(count))
    samples = ({"__key__": images.key(number), **images.load(number)} for number in numbers)
    write_shards(samples, out, shard_size=16)
    return str(out)


def _linked(data: DataOptions, folder: Path) -> DataOptions:
    """The same shards through links in `folder`, so that new indexes are written there."""
    folder.mkdir(parents=True)
    shards = expand_shards(str(data.shards))
    if data.index is not None:  # a folder of indexes: links to the existing ones
        for shard in shards:
            _link(folder, name_of(shard) + SUFFIX, Path(data.index, name_of(shard) + SUFFIX))
        return data.model_copy(update={"index": str(folder)})
    linked = []
    for number, shard in enumerate(shards):
        if not is_remote(shard):  # nothing is written next to a remote shard
            name = f"{number:06}-{name_of(shard)}"  # shards of two folders may share a name
            _link(folder, name + SUFFIX, Path(shard + SUFFIX))
            shard = _link(folder, name, Path(shard))
        linked.append(shard)
    return data.model_copy(update={"shards": "::".join(linked)})


def _link(folder: Path, name: str, target: Path) -> str:
    if target.exists():
        (folder / name).symlink_to(target.absolute())
    return str(folder / name)


def _print(recipe: Recipe, result: DryRun) -> None:
    """Print the result as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "phase", title=f"Dry run on {result.devices}: {recipe.images:,} images", title_justify="left"
    )
    for column in ("images", "img/s", "s/step", "data wait", "peak memory", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for part in result.parts:
        table.add_row(
            part.title,
            f"{part.images:,}",
            f"{part.images_per_second:.3g}",
            f"{part.seconds_a_step:.3g}",
            f"{part.data_wait:.0%}",
            f"{part.memory_gb:.2f} GB",
            duration(part.seconds),
        )
    validation = f"validation {duration(result.validation_seconds)}"
    size = f"{result.checkpoint_bytes / 1e6:,.1f} MB"
    lines = [
        f"complete recipe: {duration(result.seconds)}, including {validation}, without writing checkpoints",
        f"one checkpoint: {size}; {recipe.keep_checkpoints} are kept",
    ]
    skipped = sum(part.skipped for part in result.parts)
    if skipped:
        found = f"{skipped} of these steps had a non-finite loss or gradient"
        lines.append(f"{found}; lower optimizer.lr, or check the data")
    console = Console()
    console.print(table)
    console.print(*lines, sep="\n", markup=False, highlight=False)

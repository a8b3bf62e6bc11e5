"""A dry run: a few real steps of every phase, thrown away, and what they say about the night to come.

Nothing is written where the run or its data lie. What training would keep beside the data (indexes, shards made of a folder of
images) goes to a temporary folder of this process, which holds links to the shards and is removed at the end.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
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
from latentae.training.launch import agree, build_accelerator, close_accelerator, in_contact
from latentae.training.preparation import build_loader, check_sizes
from latentae.training.recipe import Recipe, load_recipe
from latentae.training.reporting import check_wandb, devices, peak_memory_gb
from latentae.training.signals import StopFlag
from latentae.training.steps import Trainer
from latentae.training.validation import LARGEST_BATCH, Validation, held_out_batches

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["PartSpeed", "Rehearsal", "measure_speed", "rehearse"]

FEWEST_STEPS = 3
WARM_UP = 2  # steps: memory is set aside, kernels are chosen or compiled
PACKED = 256  # images of a folder that are made into shards, at least
NEVER = 2**62
_WITH_GAME = " + GAN"


@dataclass(frozen=True)
class PartSpeed:
    """What was measured of a part of a phase: before the discriminator plays, or with it.

    Attributes:
        phase: index of the phase, from 0.
        name: number and name of the phase; "all" in a recipe without phases.
        adversarial: whether the discriminator plays.
        images: images that this part sees in the run.
        images_per_second: over all processes.
        seconds_a_step: of a global batch.
        data_wait: share of the time spent waiting for data, the mean over processes.
        memory_gb: peak of the GPU's allocator in this part, or of the process so far on a CPU; the most of any process.
        skipped: steps among those measured whose loss or gradient was not finite.
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
        """How long this part takes in the run."""
        return self.images / self.images_per_second


@dataclass(frozen=True)
class Rehearsal:
    """What a dry run found.

    Attributes:
        parts: in the order of the run.
        validation_seconds: of all validations of the run.
        checkpoint_bytes: of the largest checkpoint, to within its small files.
        devices: what was measured on.
    """

    parts: tuple[PartSpeed, ...]
    validation_seconds: float
    checkpoint_bytes: int
    devices: str

    @property
    def seconds(self) -> float:
        """How long the recipe takes: all phases and validations; writing checkpoints is not in it."""
        return sum(part.seconds for part in self.parts) + self.validation_seconds


def rehearse(recipe: str | Path | Recipe, *, seconds: float = 5.0, **overrides: Any) -> Rehearsal:
    """Take a few real steps of every phase and print speed, memory, checkpoint size and how long the whole recipe takes.

    Where a discriminator begins later than its phase, the steps before and those with it are measured apart. Started as several
    processes, all take part and the first one prints.

    Args:
        recipe: a shipped recipe's name, a TOML path, or a Recipe.
        seconds: how long to measure each part, after the warm-up; at least a few steps.
        **overrides: options of the recipe, as for `train`.

    Raises:
        RecipeError, DataError, ModelError, WeightsError, MissingDependencyError: what `train` would raise.
        TrainingError: a phase does not fit the GPU's memory.
        Interrupted: stopped by a signal.
    """
    resolved = load_recipe(recipe, overrides)
    check_wandb(resolved.log)
    accelerator = build_accelerator(resolved.precision)
    try:
        with (
            StopFlag(announce=False) as stop,
            stop.at_once("in the dry run"),
            in_contact(accelerator),
            tempfile.TemporaryDirectory(prefix="latentae-dry-run-") as folder,
        ):
            result = _rehearse(_with_shards(resolved, Path(folder)), accelerator, seconds, Path(folder))
        if accelerator.is_main_process:
            _print(resolved, result)
        return result
    finally:
        close_accelerator(accelerator)


def measure_speed(recipe: Recipe, seconds: float = 8.0, warmup_steps: int = WARM_UP) -> float:
    """Images per second that training this recipe reaches here, from real steps on its data, which are then thrown away.

    Args:
        recipe: with its data in place; a discriminator, if any, takes part from the first step.
        seconds: how long to measure, after the warm-up.
        warmup_steps: steps that do not count.
    """
    recipe = _starting_at(recipe, 0)
    accelerator = build_accelerator(recipe.precision)
    try:
        trainer, loader = Trainer(recipe, accelerator), build_loader(recipe, accelerator)
        steps, elapsed, _ = _measure(trainer, loader, seconds, warmup_steps)
        return steps * recipe.batch_size / elapsed
    finally:
        close_accelerator(accelerator)


def _rehearse(recipe: Recipe, accelerator: Accelerator, seconds: float, folder: Path) -> Rehearsal:
    speeds: list[PartSpeed] = []
    validation_seconds, checkpoint_bytes = 0.0, 0
    for index, phase in enumerate(recipe.phase_recipes()):
        phase = phase.model_copy(update={"data": _borrowed(phase.data, folder / f"phase-{index}")})
        name = f"{index} {phase.description}" if recipe.phases else "all"
        parts = _parts(phase)
        for part, images in parts:
            if accelerator.is_main_process:
                say(f"dry run: {name}, {images:,} images{_WITH_GAME if _plays(part) else ''}")
            with _fits(name):
                speed, validation, size = _rehearse_part(
                    part, accelerator, seconds, whole=part is parts[-1][0]
                )
            _free(accelerator)
            speeds.append(replace(speed, phase=index, name=name, images=images))
            validation_seconds, checkpoint_bytes = (
                validation_seconds + validation,
                max(checkpoint_bytes, size),
            )
    return Rehearsal(tuple(speeds), validation_seconds, checkpoint_bytes, devices(accelerator))


def _rehearse_part(
    recipe: Recipe, accelerator: Accelerator, seconds: float, whole: bool
) -> tuple[PartSpeed, float, int]:
    """Speed; and if `whole`, seconds of all validations of the phase, and bytes of a checkpoint."""
    trainer = Trainer(recipe, accelerator)
    check_sizes(recipe, trainer)
    speed = _speed(trainer, build_loader(recipe, accelerator), seconds)
    return (speed, _validation_seconds(trainer), _checkpoint_bytes(trainer)) if whole else (speed, 0.0, 0)


def _free(accelerator: Accelerator) -> None:
    """Let go of what a part has set aside, so that the next one is measured alone."""
    accelerator.free_memory()
    gc.collect()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(accelerator.device)


def _parts(phase: Recipe) -> list[tuple[Recipe, int]]:
    """A phase before its discriminator plays and with it, as recipes that do nothing else, and the images of each."""
    game = phase.loss.adversarial
    before = min(game.start_images, phase.images) if game.weight else phase.images
    parts = [(_starting_at(phase, NEVER), before), (_starting_at(phase, 0), phase.images - before)]
    return [(part, images) for part, images in parts if images]


def _plays(part: Recipe) -> bool:
    return part.loss.adversarial.weight > 0 and part.loss.adversarial.start_images == 0


def _starting_at(recipe: Recipe, images: int) -> Recipe:
    """The recipe with its discriminator playing from another image on."""
    adversarial = recipe.loss.adversarial.model_copy(update={"start_images": images})
    return recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"adversarial": adversarial})})


@contextmanager
def _fits(name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"phase {name} does not fit the GPU's memory; raise gradient_accumulation, set model.gradient_checkpointing, or lower "
            "batch_size or data.resolution"
        ) from error


def _speed(trainer: Trainer, loader: TrainLoader | StreamLoader, seconds: float) -> PartSpeed:
    """Speed and memory of the trainer's recipe as it is; over all processes."""
    accelerator, batch = trainer.accelerator, trainer.recipe.batch_size
    steps, elapsed, waited = _measure(trainer, loader, seconds, WARM_UP)
    own = torch.tensor([[waited / elapsed, peak_memory_gb(accelerator.device)]], device=accelerator.device)
    of_all: torch.Tensor = accelerator.gather(own)  # pyright: ignore[reportAssignmentType]
    return PartSpeed(
        phase=0,
        name="",
        adversarial=trainer.adversarial,
        images=0,
        images_per_second=steps * batch / elapsed,
        seconds_a_step=elapsed / steps,
        data_wait=of_all[:, 0].mean().item(),
        memory_gb=of_all[:, 1].max().item(),
        skipped=trainer.state.skipped,
    )


def _measure(
    trainer: Trainer, loader: TrainLoader | StreamLoader, seconds: float, warmup_steps: int
) -> tuple[int, float, float]:
    """Steps after the warm-up, and the seconds they took and waited for data; as many steps on every process.

    R1 and R2 come every so many steps: whole rounds of them are measured.
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
    """Wait for the device, which may still be working on the last step."""
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize(accelerator.device)


def _validation_seconds(trainer: Trainer) -> float:
    """Seconds of all validations of a phase, from one batch on the first process."""
    phase, log, accelerator = trainer.recipe, trainer.recipe.log, trainer.accelerator
    elapsed = 0.0
    if accelerator.is_main_process:
        batches = held_out_batches(phase.data, phase.batch_size, min(LARGEST_BATCH, log.validation_images))[
            :1
        ]
        if batches:
            start = time.monotonic()
            Validation(batches).run(trainer)
            count = phase.images / (log.validation_every_images or -(-phase.images // 10))
            elapsed = (
                (time.monotonic() - start) / len(batches[0].keys) * log.validation_images * math.ceil(count)
            )
    own = torch.tensor([elapsed], device=accelerator.device)
    return accelerator.gather(own).max().item()  # pyright: ignore[reportAttributeAccessIssue]


def _checkpoint_bytes(trainer: Trainer) -> int:
    states = [part.state_dict() for part in trainer.saved.values()]
    return sum(_bytes(state) for state in [*states, *(o.state_dict() for o in trainer.optimizers.values())])


def _bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(_bytes(child) for child in children)


def _with_shards(recipe: Recipe, folder: Path) -> Recipe:
    """Where the data is a folder of images or built-in, some of them, evenly spaced, as shards in `folder`."""
    data = recipe.data
    if data.shards is None:
        raise RecipeError("no training data: give --data.shards SHARDS (or a folder of images)")
    largest = max(phase.batch_size for phase in recipe.phase_recipes())
    count, changed = max(PACKED, math.ceil(2 * largest / (1 - data.validation_fraction))), {}
    if is_builtin(data.shards):
        changed["shards"] = _some_of(BuiltinImages(data.shards), count, folder / "shards")
    elif Path(data.shards).is_dir() and not any(Path(data.shards).glob("*.tar")):
        changed["shards"] = _some_of(ImageFolder(Path(data.shards)), count, folder / "shards")
    if is_builtin(data.validation):
        changed["validation"] = _some_of(
            BuiltinImages(data.validation), recipe.log.validation_images, folder / "held-out"
        )
    return recipe.model_copy(update={"data": data.model_copy(update=changed)})


def _some_of(images: ImageSource, count: int, made: Path) -> str:
    count = min(len(images.sizes), count)
    numbers = (index * len(images.sizes) // count for index in range(count))
    write_shards(
        ({"__key__": images.key(number), **images.load(number)} for number in numbers), made, shard_size=16
    )
    return str(made)


def _borrowed(data: DataOptions, folder: Path) -> DataOptions:
    """The same shards by way of links in `folder`, so that indexes made now are written there."""
    folder.mkdir(parents=True)
    shards = expand_shards(str(data.shards))
    if data.index is not None:  # a folder of indexes: links to those that it has
        for shard in shards:
            _link(folder, name_of(shard) + SUFFIX, Path(data.index, name_of(shard) + SUFFIX))
        return data.model_copy(update={"index": str(folder)})
    linked = []
    for number, shard in enumerate(shards):
        if not is_remote(shard):  # nothing is ever written beside a remote one
            name = f"{number:06}-{name_of(shard)}"  # shards of two folders may share a name
            _link(folder, name + SUFFIX, Path(shard + SUFFIX))
            shard = _link(folder, name, Path(shard))
        linked.append(shard)
    return data.model_copy(update={"shards": "::".join(linked)})


def _link(folder: Path, name: str, target: Path) -> str:
    if target.exists():
        (folder / name).symlink_to(target.absolute())
    return str(folder / name)


def _print(recipe: Recipe, result: Rehearsal) -> None:
    """The findings as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Dry run on {result.devices}: {recipe.images:,} images", title_justify="left")
    table.add_column("phase")
    for column in ("images", "img/s", "s/step", "data wait", "peak memory", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for part in result.parts:
        table.add_row(
            part.name + (_WITH_GAME if part.adversarial else ""),
            f"{part.images:,}",
            f"{part.images_per_second:.3g}",
            f"{part.seconds_a_step:.3g}",
            f"{part.data_wait:.0%}",
            f"{part.memory_gb:.2f} GB",
            duration(part.seconds),
        )
    console = Console()
    console.print(table)
    lines = [
        f"the whole recipe: {duration(result.seconds)}, of which validation {duration(result.validation_seconds)}; "
        "checkpoints come on top",
        f"a checkpoint: {result.checkpoint_bytes / 1e6:,.1f} MB; {recipe.keep_checkpoints} are kept",
    ]
    skipped = sum(part.skipped for part in result.parts)
    if skipped:
        lines.append(
            f"{skipped} of these steps had a loss or gradient that is not finite: lower optimizer.lr, or see to the data"
        )
    for line in lines:
        console.print(line, markup=False, highlight=False)

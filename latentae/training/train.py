"""The verb `train`: from a recipe and shards to a run folder."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentae.errors import Interrupted, OutputError, RecipeError, TrainingError
from latentae.file_names import BAD_SAMPLES, RECIPE, RECORD
from latentae.files import INCOMPLETE, write_text
from latentae.jobs import Job
from latentae.options import recipe_verb
from latentae.progress import Progress, say
from latentae.training.checkpoint import find_checkpoint, read_state, restore, save_checkpoint
from latentae.training.claim import Claim, FolderPlace
from latentae.training.config import describe_phases
from latentae.training.dry_run import dry_run
from latentae.training.init import take_head_start
from latentae.training.launch import StopFlag, launched, on_main
from latentae.training.loop import PhaseLoop, Validation
from latentae.training.mirror import Mirror, UrlPlace
from latentae.training.options import TrainOptions
from latentae.training.recipe import Recipe, load_recipe
from latentae.training.reporting import MetricsLog, check_wandb, devices
from latentae.training.steps import Trainer
from latentae.training.summary import write_summary
from latentae.training.training_data import build_loader, job_inputs, make_shards

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["train"]


@recipe_verb(TrainOptions)
def train(options: TrainOptions) -> Path:
    """Train an autoencoder. Run it again to resume.

    Options of the recipe are keywords: `images=1000`, `data={"shards": "photos"}`,
    `**{"optimizer.lr": 1e-3}`.

    Returns:
        The run folder.

    Raises:
        RecipeError, DataError, OutputError, ModelError, WeightsError, TrainingError: one line each;
            no file is half-written.
        Interrupted: stopped by a signal, after the state was saved.
    """
    initial = {} if options.init_from is None else {"model.init_from": str(options.init_from)}
    recipe = load_recipe(options.recipe, {**options.overrides, **initial})
    if options.dry_run:
        dry_run(recipe)
        return Path(options.output or "")
    if options.output is None:
        raise RecipeError("no run folder: give --output FOLDER (or --dry-run to write nothing)")
    run = Path(options.output)
    check_wandb(recipe.log)
    recipe.autoencoder_config()
    with launched(recipe.precision) as accelerator, StopFlag(accelerator.is_main_process) as stop:
        claim = Claim(lost=lambda: stop.request("another training"))
        try:
            _train(recipe, run, str(options.resume), accelerator, stop, claim)
        finally:
            claim.release()
    return run


def _train(
    recipe: Recipe, folder: Path, resume: str, accelerator: Accelerator, stop: StopFlag, claim: Claim
) -> None:
    with stop.at_once():
        on_main(accelerator, lambda: _claim(claim, folder))
    recipe = on_main(accelerator, lambda: make_shards(recipe, folder))
    run = _Run(recipe, folder, job_inputs(recipe), accelerator, stop, claim)
    if on_main(accelerator, lambda: _already_finished(folder, run.inputs, resume)):
        on_main(accelerator, run.copy_again)
        say(f"{folder} is finished: {recipe.images} images seen; nothing to do")
    else:
        run.train(resume)


def _claim(claim: Claim, run: Path) -> None:
    """Claim a run folder, unless it is read-only."""
    if not run.is_dir() or os.access(run, os.W_OK):
        claim.take(FolderPlace(run))


def _already_finished(run: Path, inputs: dict[str, Any], resume: str) -> bool:
    """Refuse a folder with other content, before any heavy work."""
    if not run.is_dir() or all(entry.name.endswith(INCOMPLETE) for entry in run.iterdir()):
        return False
    if resume == "never":
        raise OutputError(f"{run} is not empty and --resume is never; choose another output")
    if resume != "auto" and (run / RECORD).exists():
        raise OutputError(f"{run} already has a run; --resume PATH starts a new one, choose an empty output")
    return Job.open(run, "train", inputs).state == "finished"


@dataclass
class _Run:
    """One run: trains its phases in order, from its last checkpoint."""

    recipe: Recipe
    folder: Path
    inputs: dict[str, Any]
    accelerator: Accelerator
    stop: StopFlag
    claim: Claim
    mirror: Mirror | None = None

    def __post_init__(self) -> None:
        self.phases, self.main = self.recipe.phase_recipes(), self.accelerator.is_main_process

    def train(self, resume: str) -> None:
        """Train the remaining images."""
        with self.stop.at_once("before the first step"):
            start = on_main(self.accelerator, lambda: self._starting_point(resume))
            first = 0 if start is None else self._phase_after(start)
            self._enter(first, start)
            job = on_main(self.accelerator, lambda: Job.open(self.folder, "train", self.inputs))
            log = self._open_log(start) if self.main else None
        seen = min(self.trainer.state.images_seen, self.recipe.images)
        progress = Progress("training", self.recipe.images, initial=seen, quiet=not self.main)
        try:
            with log or nullcontext(), progress:
                for phase in range(first, len(self.phases)):
                    if phase > first:
                        self._next(phase)
                    loop = PhaseLoop(
                        self.trainer,
                        self.loader,
                        self.folder,
                        self.validation,
                        self._save,
                        log,
                        progress,
                        self.stop,
                    )
                    loop.train()
            state = self.trainer.state
            on_main(self.accelerator, lambda: job.finish(images_seen=state.images_seen, steps=state.step))
        except Interrupted:
            if not self.stop.requeue:  # a scheduler does not wait for a page
                self._summarize()
            raise
        self._summarize()

    def _summarize(self) -> None:
        if self.main and self.recipe.log.summary:
            say(f"summary: {write_summary(self.folder)}")

    def _open_mirror(self) -> Mirror | None:
        """The recipe's `checkpoint_url`, claimed for this job; None if it has none."""
        if self.recipe.checkpoint_url is None:
            return None
        url, keep = self.recipe.checkpoint_url, self.recipe.keep_checkpoints
        mirror = Mirror(url, self.inputs, keep, lambda: self.stop.requested)
        mirror.claim()
        return mirror

    def copy_again(self) -> None:
        """Copy the last checkpoint of a finished run, in case that copy failed."""
        if mirror := self._open_mirror():
            mirror.newest(self.folder)

    def _starting_point(self, resume: str) -> Path | None:
        """The checkpoint to resume from, on the first process.

        Downloaded if only `checkpoint_url` has it.
        """
        self.mirror = self._open_mirror()
        if self.mirror is not None:
            self.claim.take(UrlPlace(self.mirror))
            if resume == "auto":
                Job.open(self.folder, "train", self.inputs)  # refuses another job before the download
                return self.mirror.newest(self.folder)
        own = resume in ("auto", "never")
        found = find_checkpoint(self.folder if own else Path(resume))
        if found is None and not own:
            raise TrainingError(f"--resume {resume} has no checkpoint; give a run folder or a checkpoint")
        return found

    def _phase_after(self, checkpoint: Path) -> int:
        """The phase of a checkpoint, or the next one if the checkpoint ended it."""
        state = read_state(checkpoint)
        if state.phase >= len(self.phases):
            expected = f"the recipe has {len(self.phases)} phases, counted from 0"
            raise TrainingError(f"{checkpoint} is in phase {state.phase}, but {expected}")
        ended = state.phase_images >= self.phases[state.phase].images
        return min(state.phase + ended, len(self.phases) - 1)

    def _enter(self, phase: int, checkpoint: Path | None) -> None:
        """Build networks and data of a phase, and restore a checkpoint."""
        recipe, accelerator = self.phases[phase], self.accelerator
        self.loader = build_loader(recipe, accelerator, self.folder / BAD_SAMPLES)
        self.validation = Validation.of(recipe, accelerator)
        self.trainer = Trainer(recipe, accelerator)
        self.trainer.check_resolution()
        if checkpoint is None:
            take_head_start(self.trainer, self.validation.batches)
            return
        position = restore(self.trainer, checkpoint, phase)
        if position is not None:
            self.loader.load_state_dict(position)

    def _next(self, phase: int) -> None:
        """Enter the next phase with the weights that the previous one saved."""
        end = find_checkpoint(self.folder)
        del self.trainer, self.loader, self.validation
        self.accelerator.free_memory()
        with self.stop.at_once(f"before phase {phase}"):
            self._enter(phase, end)
        if self.main:
            say(f"phase {phase} of {len(self.phases)}, counted from 0: {self.phases[phase].description}")
            self.loader.announce()

    def _save(self) -> None:
        """Save and copy a checkpoint on the first process; an error of saving is raised on all."""
        position = self.loader.state_dict()

        def write() -> None:
            self.claim.check()
            folder = save_checkpoint(self.trainer, self.folder, position, self.inputs)
            if self.mirror is not None:
                self.mirror.push(folder)

        on_main(self.accelerator, write)

    def _open_log(self, start: Path | None) -> MetricsLog:
        write_text(self.folder / RECIPE, self.recipe.toml())
        self._announce(start)
        state = self.trainer.state
        log = MetricsLog(self.folder, state.step, self.recipe.log, self.recipe)
        log.event(state.step, state.images_seen, "start", devices(self.accelerator))
        return log

    def _announce(self, start: Path | None) -> None:
        model, recipe = self.trainer.raw_autoencoder, self.trainer.recipe
        f, z, c = model.config.downsampling, model.config.latent_channels, model.config.in_channels
        size, r = sum(p.numel() for p in model.parameters()), recipe.data.resolution
        say(f"model: {size / 1e6:.2f} M parameters, f{f} z{z}: {r} x {r} x {c} -> {r // f} x {r // f} x {z}")
        self.loader.announce()
        say(f"validation: {sum(len(batch.keys) for batch in self.validation.batches)} held-out images")
        for line in describe_phases(self.recipe):
            say(line)
        say(f"{devices(self.accelerator)}, global batch {recipe.batch_size}")
        if start is not None:
            say(f"resuming {start} at image {self.trainer.state.images_seen} of {self.recipe.images}")

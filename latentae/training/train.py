"""The verb `train`: from a recipe and shards to a run folder."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentae.errors import Interrupted, OutputError, RecipeError, TrainingError
from latentae.file_names import BAD_SAMPLES, RECIPE, RECORD
from latentae.files import INCOMPLETE, write_text
from latentae.jobs import Job
from latentae.options import recipe_verb
from latentae.progress import Progress, say
from latentae.training.checkpoint import find_checkpoint, read_state, save_checkpoint
from latentae.training.claim import Claim, FolderPlace
from latentae.training.config import describe_phases
from latentae.training.head_start import take_head_start
from latentae.training.launch import build_accelerator, close_accelerator, in_contact, on_main
from latentae.training.loop import PhaseLoop
from latentae.training.mirror import Mirror, UrlPlace
from latentae.training.options import TrainOptions
from latentae.training.preparation import build_loader, build_validation, check_sizes, job_inputs, make_shards
from latentae.training.recipe import Recipe, load_recipe
from latentae.training.recovery import restore
from latentae.training.reporting import MetricsLog, check_wandb, devices
from latentae.training.signals import StopFlag
from latentae.training.steps import Trainer
from latentae.training.summary import write_summary

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["train"]


@recipe_verb(TrainOptions)
def train(options: TrainOptions) -> Path:
    """Train an autoencoder. Run it again to resume.

    Options of the recipe are keywords: `images=1000`, `data={"shards": "photos"}`, `**{"optimizer.lr": 1e-3}`.

    Returns:
        The run folder.

    Raises:
        RecipeError, DataError, OutputError, ModelError, WeightsError, TrainingError: one line each, nothing half-written.
        Interrupted: stopped by a signal, after the state was saved.
    """
    initial = {} if options.init_from is None else {"model.init_from": str(options.init_from)}
    resolved = load_recipe(options.recipe, {**options.overrides, **initial})
    if options.dry_run:
        from latentae.training.rehearsal import rehearse

        rehearse(resolved)
        return Path(options.output or "")
    if options.output is None:
        raise RecipeError("no run folder: give --output FOLDER (or --dry-run to write nothing)")
    return _train(resolved, Path(options.output), options.resume)


def _train(resolved: Recipe, run: Path, resume: str | Path) -> Path:
    check_wandb(resolved.log)
    resolved.autoencoder_config()
    accelerator = build_accelerator(resolved.precision)
    claim: Claim | None = None
    try:
        with StopFlag(announce=accelerator.is_main_process) as stop, in_contact(accelerator):
            claim = Claim(lost=lambda: stop.request("another training"))
            with stop.at_once():
                on_main(accelerator, partial(_claim, claim, run))
            resolved = on_main(accelerator, lambda: make_shards(resolved, run))
            inputs = job_inputs(resolved)
            if on_main(accelerator, lambda: _already_finished(run, inputs, str(resume))):
                on_main(accelerator, lambda: _copy_again(resolved, run, inputs, stop))
                say(f"{run} is finished: {resolved.images} images seen; nothing to do")
                return run
            _Run(resolved, run, inputs, accelerator, stop, claim).train(resume)
    finally:
        if claim is not None:
            claim.release()
        close_accelerator(accelerator)
    return run


def _claim(claim: Claim, run: Path) -> None:
    """Claim a run folder. One that is read-only needs no claim: a finished run says so, and any other fails at its first write."""
    if not run.is_dir() or os.access(run, os.W_OK):
        claim.take(FolderPlace(run))


def _already_finished(run: Path, inputs: dict[str, Any], resume: str) -> bool:
    """Refuse a folder that holds something else, before any heavy work."""
    if not run.is_dir() or all(entry.name.endswith(INCOMPLETE) for entry in run.iterdir()):
        return False
    if resume == "never":
        raise OutputError(f"{run} is not empty and --resume is never; choose another output")
    if resume != "auto" and (run / RECORD).exists():
        raise OutputError(
            f"{run} already holds a run; --resume PATH begins a new one, so choose an empty output"
        )
    return Job.open(run, "train", inputs).state == "finished"


def _mirror(recipe: Recipe, inputs: dict[str, Any], stop: StopFlag) -> Mirror | None:
    """Where checkpoints are copied to, claimed for this job; None where the recipe names no address."""
    if recipe.checkpoint_url is None:
        return None
    mirror = Mirror(recipe.checkpoint_url, inputs, recipe.keep_checkpoints, lambda: stop.requested)
    mirror.claim()
    return mirror


def _copy_again(recipe: Recipe, run: Path, inputs: dict[str, Any], stop: StopFlag) -> None:
    """The last checkpoint of a finished run may have failed to be copied."""
    mirror = _mirror(recipe, inputs, stop)
    if mirror is not None:
        mirror.newest(run)


class _Run:
    """One run: its phases one after the other, from wherever its last checkpoint stands."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        inputs: dict[str, Any],
        accelerator: Accelerator,
        stop: StopFlag,
        claim: Claim,
    ) -> None:
        self.recipe, self.folder, self.inputs, self.accelerator = recipe, folder, inputs, accelerator
        self.stop, self.claim = stop, claim
        self.phases, self.main = recipe.phase_recipes(), accelerator.is_main_process
        self.mirror: Mirror | None = None

    def train(self, resume: str | Path) -> None:
        """Train what is left of it."""
        with self.stop.at_once("before the first step"):
            start = on_main(self.accelerator, lambda: self._starting_point(resume))
            first = 0 if start is None else self._phase_after(start)
            self._enter(first, start)
            job = on_main(self.accelerator, lambda: Job.open(self.folder, "train", self.inputs))
            log = self._open_log(start) if self.main else None
        seen = min(self.trainer.state.images_seen, self.recipe.images)
        try:
            with (
                log or nullcontext(),
                Progress("training", self.recipe.images, initial=seen, quiet=not self.main) as progress,
            ):
                for phase in range(first, len(self.phases)):
                    if phase > first:
                        self._next(phase)
                    PhaseLoop(
                        self.trainer,
                        self.loader,
                        self.folder,
                        self.validation,
                        self._save,
                        log,
                        progress,
                        self.stop,
                    ).train()
            state = self.trainer.state
            on_main(self.accelerator, lambda: job.finish(images_seen=state.images_seen, steps=state.step))
        except Interrupted:
            if not self.stop.requeue:  # a scheduler that asked for the end does not wait for a page
                self._summarize()
            raise
        self._summarize()

    def _summarize(self) -> None:
        if self.main and self.recipe.log.summary:
            say(f"summary: {write_summary(self.folder)}")

    def _starting_point(self, resume: str | Path) -> Path | None:
        """The checkpoint to go on from, fetched first if it is only at the recipe's `checkpoint_url`; on the first process."""
        self.mirror = _mirror(self.recipe, self.inputs, self.stop)
        if self.mirror is not None:
            self.claim.take(UrlPlace(self.mirror))
        if self.mirror is not None and resume == "auto":
            Job.open(
                self.folder, "train", self.inputs
            )  # the folder must be ours before a checkpoint is put into it
            return self.mirror.newest(self.folder)
        found = find_checkpoint(self.folder if resume in ("auto", "never") else Path(resume))
        if found is None and resume not in ("auto", "never"):
            raise TrainingError(
                f"--resume {resume} holds no checkpoint; give a run folder or one of its checkpoints"
            )
        return found

    def _phase_after(self, checkpoint: Path) -> int:
        """The phase that a checkpoint stands in, or the next one where it ended one."""
        state = read_state(checkpoint)
        if state.phase >= len(self.phases):
            raise TrainingError(
                f"{checkpoint} stands in phase {state.phase}, but the recipe has {len(self.phases)}, counted from 0"
            )
        ended = state.phase_images >= self.phases[state.phase].images
        return min(state.phase + ended, len(self.phases) - 1)

    def _enter(self, phase: int, checkpoint: Path | None) -> None:
        """Build networks and data of a phase, with the state of a checkpoint of it or of an earlier one."""
        recipe = self.phases[phase]
        self.loader = build_loader(recipe, self.accelerator, self.folder / BAD_SAMPLES)
        self.validation = build_validation(recipe, self.accelerator)
        self.trainer = Trainer(recipe, self.accelerator)
        check_sizes(recipe, self.trainer)
        if checkpoint is None:
            take_head_start(self.trainer, self.validation)
            return
        position = restore(self.trainer, checkpoint, phase)
        if position is not None:
            self.loader.load_state_dict(position)

    def _next(self, phase: int) -> None:
        """Go on with the next phase on the weights that the last one saved."""
        end = find_checkpoint(self.folder)
        del self.trainer, self.loader, self.validation
        self.accelerator.free_memory()
        with self.stop.at_once(f"before phase {phase}"):
            self._enter(phase, end)
        if self.main:
            say(f"phase {phase} of {len(self.phases)}, counted from 0: {self.phases[phase].description}")
            self.loader.announce()

    def _save(self) -> None:
        """The first process writes a checkpoint; its error reaches all."""
        position = self.loader.state_dict()

        def write() -> None:
            self.claim.check()
            save_checkpoint(self.trainer, self.folder, position, self.inputs, self.mirror)

        on_main(self.accelerator, write)

    def _open_log(self, start: Path | None) -> MetricsLog:
        write_text(self.folder / RECIPE, self.recipe.toml())
        self._announce(start)
        state = self.trainer.state
        log = MetricsLog(self.folder, state.step, self.recipe.log, self.recipe)
        log.event(state.step, state.images_seen, "start", devices(self.accelerator))
        return log

    def _announce(self, start: Path | None) -> None:
        a, config = self.accelerator, self.trainer.raw_autoencoder.config
        size = sum(p.numel() for p in self.trainer.raw_autoencoder.parameters())
        f, z, r, c = (
            config.downsampling,
            config.latent_channels,
            self.trainer.recipe.data.resolution,
            config.in_channels,
        )
        say(f"model: {size / 1e6:.2f} M parameters, f{f} z{z}: {r} x {r} x {c} -> {r // f} x {r // f} x {z}")
        self.loader.announce()
        say(f"validation: {sum(len(b.keys) for b in self.validation.batches)} held-out images")
        for line in describe_phases(self.recipe):
            say(line)
        precision = a.mixed_precision.replace("no", "fp32")
        say(
            f"{a.num_processes} process(es) on {a.device.type}, {precision}, global batch {self.trainer.recipe.batch_size}"
        )
        if start is not None:
            say(f"resuming {start} at image {self.trainer.state.images_seen} of {self.recipe.images}")

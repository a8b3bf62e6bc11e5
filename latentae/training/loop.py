"""The loop around the training step: data in; metrics, pictures and checkpoints out; clean stops and returns from bad numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from latentae.data.loader import Batch, TrainLoader
from latentae.data.streaming import StreamLoader
from latentae.pages.images import pil_image, write_png
from latentae.progress import Progress, say
from latentae.training.health import Watchdog
from latentae.training.launch import agree
from latentae.training.recovery import roll_back
from latentae.training.reporting import MetricsLog, peak_memory_gb
from latentae.training.signals import StopFlag
from latentae.training.steps import Trainer, TrainState
from latentae.training.validation import Validation

__all__ = ["PhaseLoop"]


class Clock:
    """Fires each time the number of images seen passes a multiple of `every`."""

    def __init__(self, every: int) -> None:
        self.every = max(1, every)

    def due(self, before: int, now: int) -> bool:
        """Whether a multiple of `every` lies in (before, now]."""
        return now // self.every > before // self.every


class Timer:
    """Images per second, and the share of time spent waiting for data, since the last report."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a new span (after work that is not training)."""
        self.start, self.waited, self.images = time.monotonic(), 0.0, 0

    def read(self, processes: int) -> dict[str, float]:
        """Speed over all processes since the last call, and begin a new span."""
        elapsed = max(time.monotonic() - self.start, 1e-9)
        values = {"img_per_s": self.images * processes / elapsed, "data_wait": self.waited / elapsed}
        self.restart()
        return values


class PhaseLoop:
    """Trains one phase to its end.

    Args:
        trainer: networks, with a restored state where a run goes on.
        loader: this process's data, at the matching position.
        run: the run folder.
        validation: held-out images (may be none).
        save: writes a checkpoint of the present state, on all processes at once.
        log: where metrics go; None on all processes but the first.
        progress: counts the images of the whole run.
        stop: set by signals.
    """

    def __init__(
        self,
        trainer: Trainer,
        loader: TrainLoader | StreamLoader,
        run: Path,
        validation: Validation,
        save: Callable[[], None],
        log: MetricsLog | None,
        progress: Progress,
        stop: StopFlag,
    ) -> None:
        self.trainer, self.loader, self.run, self.validation = trainer, loader, run, validation
        self.save, self.log, self.progress, self.stop = save, log, progress, stop
        recipe = trainer.recipe
        self.checkpoints = Clock(recipe.checkpoint_every_images)
        self.metrics = Clock(recipe.log.metrics_every_images or -(-recipe.images // 200))
        self.validations = Clock(recipe.log.validation_every_images or -(-recipe.images // 10))
        self.watchdog = Watchdog(recipe)
        self.timer, self.bad_samples = Timer(), 0
        begin = trainer.state.images_seen - trainer.state.phase_images
        for line in log.kept if log is not None else ():  # what a resumed phase has been through
            if line["images"] > begin:
                self.watchdog.check(line["images"], line)

    @property
    def state(self) -> TrainState:
        """The counters, which a return to a checkpoint replaces."""
        return self.trainer.state

    def train(self) -> None:
        """Train until the phase's images have been seen; its last state is saved and validated.

        Raises:
            Interrupted: a signal came; the state was saved first.
            TrainingError: losses were not finite for too long, or there is no checkpoint to return to.
        """
        if self.state.images_seen == 0 and self.trainer.recipe.model.initialization == "pca":
            self.validate()  # this start is worth looking at
        with closing(iter(self.loader)) as batches:  # an error ends the data workers too
            self._warm_up(batches)
            self.timer.restart()
            while not self.trainer.finished:
                before = self.state.images_seen
                self._step(batches)
                now, finished = self.state.images_seen, self.trainer.finished
                saved = finished or self.checkpoints.due(before, now)
                if saved:
                    self._save()  # before a look at held-out images: a run that ends in there loses nothing
                if self.validations.due(before, now) and not finished:
                    self.validate()
                self._stop_if_asked(saved)
        self.validate()
        self._stop_if_asked(saved=True)

    def _stop_if_asked(self, saved: bool) -> None:
        """Leave at the same step on all processes, with the state saved."""
        (stopping,) = agree(self.trainer.accelerator, self.stop.requested)
        if stopping:
            if not saved:
                self._save()
            raise self.stop.interrupted(
                f"stopped after {self.state.images_seen} images; the same command goes on from there"
            )

    def _save(self) -> None:
        self.save()
        self.timer.restart()

    def _warm_up(self, batches: Iterator[Batch]) -> None:
        """The first step: torch.compile may take minutes here, with nothing to save yet, so a signal ends it at once."""
        if self.trainer.recipe.compile and not self.trainer.finished:
            say("compiling; the first step takes a while")
            with self.stop.at_once("before the first step"):
                self._step(batches)

    def _step(self, batches: Iterator[Batch]) -> None:
        recipe, state = self.trainer.recipe, self.state
        skipped, remaining = state.skipped, recipe.images - state.phase_images
        report = self.metrics.due(state.images_seen, state.images_seen + recipe.batch_size) or state.step == 0
        terms = self.trainer.update(self._parts(batches), report)
        self.progress.advance(min(recipe.batch_size, remaining))
        if state.skipped > skipped:
            self._skipped(terms)
        elif report:
            values = self._report(terms)
            self.progress.advance(0, note=f"loss {values['loss/total']:.4f}")

    def _parts(self, batches: Iterator[Batch]) -> tuple[Tensor, ...]:
        """This process's share of a global batch, cut into accumulation steps."""
        start = time.monotonic()
        batch = next(batches)
        self.timer.waited += time.monotonic() - start
        self.timer.images += len(batch.images)
        self.bad_samples += len(batch.bad)
        return batch.images.chunk(self.trainer.recipe.gradient_accumulation)

    def _skipped(self, terms: dict[str, Tensor]) -> None:
        """Say that a step was left out; too many in a row, and the weights return to the last checkpoint."""
        state, limits = self.state, self.trainer.recipe.failure
        names = [name for name, value in terms.items() if not torch.isfinite(value)]
        what = (
            f"step {state.step} left out: {names[0] if names else 'a term of another process'} is not finite"
        )
        self._event("skipped", what)
        if state.skipped_in_a_row >= limits.max_skipped_in_a_row:
            message = roll_back(self.trainer, self.run)
            self._event("rollback", message)
            self._save()

    def _report(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Average the terms over processes and write them, with the speed."""
        accelerator, state = self.trainer.accelerator, self.state
        bad = torch.tensor(float(self.bad_samples), device=accelerator.device)
        stacked = torch.stack([*(value.float() for value in terms.values()), bad])
        if accelerator.num_processes > 1:
            stacked = accelerator.reduce(stacked, "mean")
        values = dict(zip([*terms, "bad_samples"], stacked.tolist(), strict=True))  # pyright: ignore
        values["bad_samples"] *= accelerator.num_processes  # their sum
        values |= self.timer.read(accelerator.num_processes)
        values |= {
            "lr": next(iter(self.trainer.optimizers.values())).param_groups[0]["lr"],
            "time": time.time(),
            "memory_gb": peak_memory_gb(accelerator.device),
        }
        values |= {"skipped_steps": state.skipped, "phase": state.phase}
        if self.log is not None:
            self.log.write(state.step, state.images_seen, values)
            self._warn(values)
        return values

    def validate(self) -> None:
        """Measure on the first process; the others wait. Nothing is written where a signal cut it short."""
        trainer, log, seen = self.trainer, self.log, self.state.images_seen
        found = (
            self.validation.run(trainer, lambda: self.stop.requested)
            if log is not None and self.validation.batches
            else None
        )
        if found is not None and log is not None:
            values, picture = found
            log.write(self.state.step, seen, values)
            write_png(self.run / "samples" / f"{seen:09}.png", picture)
            log.picture(seen, pil_image(picture))
            similar = f", SSIM {values['validation/ssim']:.3f}" if "validation/ssim" in values else ""
            say(f"held out, {seen} images seen: PSNR {values['validation/psnr']:.2f} dB{similar}")
            self._warn(values)
        trainer.accelerator.wait_for_everyone()
        self.timer.restart()

    def _warn(self, values: dict[str, float]) -> None:
        for warning in self.watchdog.check(self.state.images_seen, values):
            self._event("warning", warning)

    def _event(self, kind: str, message: str) -> None:
        if self.log is not None:
            say(f"{kind}: {message}")
            self.log.event(self.state.step, self.state.images_seen, kind, message)

"""Training loop: runs steps, logs, validates, saves, and rolls back on non-finite losses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentae.data.loader import Batch, TrainLoader
from latentae.data.streaming import StreamLoader
from latentae.data.transforms import to_float, to_uint8
from latentae.measures.metrics import TAPS, psnr, ssim
from latentae.models.base import Autoencoder
from latentae.models.config import build
from latentae.pages.images import image_grid, pil_image, write_png
from latentae.progress import Progress, say
from latentae.training.checkpoint import roll_back
from latentae.training.health import Watchdog
from latentae.training.launch import StopFlag, agree, mean_over_processes
from latentae.training.recipe import Recipe
from latentae.training.reporting import MetricsLog, peak_memory_gb
from latentae.training.steps import Trainer, TrainState
from latentae.training.training_data import held_out_batches

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["PhaseLoop", "Validation"]

PICTURES = 8


class Timer:
    """Images per second, and the share of time spent waiting for data, since the last restart."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start a new span, after a report or work that is not training."""
        self.start, self.waited, self.images = time.monotonic(), 0.0, 0

    def read(self, processes: int) -> dict[str, float]:
        """Speed over all processes since the restart; restarts."""
        elapsed = max(time.monotonic() - self.start, 1e-9)
        values = {"img_per_s": self.images * processes / elapsed, "data_wait": self.waited / elapsed}
        self.restart()
        return values


@dataclass
class PhaseLoop:
    """Trains one phase to its end.

    Attributes:
        trainer: networks, with a restored state if a run resumes.
        loader: this process's data, at the matching position.
        run: the run folder.
        validation: held-out images; may be empty.
        save: saves a checkpoint of the current state, called on all processes at once.
        log: metrics log; None except on the first process.
        progress: counts the images of the run.
        stop: set by signals.
    """

    trainer: Trainer
    loader: TrainLoader | StreamLoader
    run: Path
    validation: Validation
    save: Callable[[], None]
    log: MetricsLog | None
    progress: Progress
    stop: StopFlag

    def __post_init__(self) -> None:
        self.accelerator, self.recipe = self.trainer.accelerator, self.trainer.recipe
        options, images = self.recipe.log, self.recipe.images
        self.metrics_every = options.metrics_every_images or -(-images // 200)
        self.validate_every = options.validation_every_images or -(-images // 10)
        self.watchdog = Watchdog(self.recipe)
        self.timer, self.bad_samples = Timer(), 0
        begin = self.state.images_seen - self.state.phase_images
        for line in self.log.kept if self.log is not None else ():  # of a resumed phase
            if line["images"] > begin:
                self.watchdog.check(line["images"], line)

    @property
    def state(self) -> TrainState:
        """The counters, which a rollback replaces."""
        return self.trainer.state

    def train(self) -> None:
        """Train until all images of the phase have been seen.

        The last state is saved and validated.

        Raises:
            Interrupted: a signal was received; the state is saved.
            TrainingError: too many non-finite losses, or no checkpoint to roll back to.
        """
        if self.state.images_seen == 0 and self.recipe.model.initialization == "pca":
            self.validate()  # of the start
        with closing(iter(self.loader)) as batches:  # an error ends the data workers too
            if self.recipe.compile and not self.trainer.finished:
                say("compiling; the first step takes a while")
                with self.stop.at_once("before the first step"):
                    self._step(batches)
            self.timer.restart()
            while not self.trainer.finished:
                before = self.state.images_seen
                self._step(batches)
                finished = self.trainer.finished
                saved = finished or self._passed(before, self.recipe.checkpoint_every_images)
                if saved:
                    self._save()  # before the validation, so that nothing is lost if that fails
                if self._passed(before, self.validate_every) and not finished:
                    self.validate()
                self._stop_if_asked(saved)
        self.validate()
        self._stop_if_asked(saved=True)

    def _passed(self, before: int, every: int) -> bool:
        """Whether a multiple of `every` is in (before, images seen]."""
        return self.state.images_seen // every > before // every

    def _stop_if_asked(self, saved: bool) -> None:
        """Stop at the same step on all processes, with the state saved."""
        (stopping,) = agree(self.accelerator, self.stop.requested)
        if stopping:
            if not saved:
                self._save()
            done = f"stopped after {self.state.images_seen} images"
            raise self.stop.interrupted(f"{done}; run the same command again to resume")

    def _save(self) -> None:
        self.save()
        self.timer.restart()

    def _step(self, batches: Iterator[Batch]) -> None:
        state, size = self.state, self.recipe.batch_size
        skipped, remaining = state.skipped, self.recipe.images - state.phase_images
        due = (state.images_seen + size) // self.metrics_every > state.images_seen // self.metrics_every
        report = due or state.step == 0
        terms = self.trainer.update(self._parts(batches), report)
        self.progress.advance(min(size, remaining))
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
        return batch.images.chunk(self.recipe.gradient_accumulation)

    def _skipped(self, terms: dict[str, Tensor]) -> None:
        """Log a skipped step; roll back after too many in a row."""
        state = self.state
        bad = next((name for name, value in terms.items() if not torch.isfinite(value)), None)
        self._event("skipped", f"step {state.step}: {bad or 'a term of another process'} is not finite")
        if state.skipped_in_a_row >= self.recipe.failure.max_skipped_in_a_row:
            self._event("rollback", roll_back(self.trainer, self.run))
            self._save()

    def _report(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Average the terms over processes and log them with the speed."""
        accelerator, state = self.accelerator, self.state
        bad = torch.tensor(float(self.bad_samples), device=accelerator.device)
        stacked = torch.stack([*(value.float() for value in terms.values()), bad])
        means = mean_over_processes(accelerator, stacked).tolist()
        values = dict(zip([*terms, "bad_samples"], means, strict=True))
        values["bad_samples"] *= accelerator.num_processes  # the sum
        values |= self.timer.read(accelerator.num_processes) | {
            "lr": next(iter(self.trainer.optimizers.values())).param_groups[0]["lr"],
            "time": time.time(),
            "memory_gb": peak_memory_gb(accelerator.device),
            "skipped_steps": state.skipped,
            "phase": state.phase,
        }
        if self.log is not None:
            self.log.write(state.step, state.images_seen, values)
            self._warn(values)
        return values

    def validate(self) -> None:
        """Validate on the first process; all wait for it.

        A validation that a signal stopped is not logged.
        """
        log, seen, found = self.log, self.state.images_seen, None
        if log is not None and self.validation.batches:
            found = self.validation.run(self.trainer, lambda: self.stop.requested)
        if found is not None and log is not None:
            values, picture = found
            log.write(self.state.step, seen, values)
            write_png(self.run / "samples" / f"{seen:09}.png", picture)
            log.picture(seen, pil_image(picture))
            similar = f", SSIM {values['validation/ssim']:.3f}" if "validation/ssim" in values else ""
            say(f"held out, {seen} images seen: PSNR {values['validation/psnr']:.2f} dB{similar}")
            self._warn(values)
        self.accelerator.wait_for_everyone()
        self.timer.restart()

    def _warn(self, values: dict[str, float]) -> None:
        for warning in self.watchdog.check(self.state.images_seen, values):
            self._event("warning", warning)

    def _event(self, kind: str, message: str) -> None:
        if self.log is not None:
            say(f"{kind}: {message}")
            self.log.event(self.state.step, self.state.images_seen, kind, message)


@dataclass
class Validation:
    """Measures a fixed set of held-out images.

    Attributes:
        batches: the images, kept in memory.
    """

    batches: list[Batch]

    @classmethod
    def of(cls, recipe: Recipe, accelerator: Accelerator) -> Validation:
        """The held-out images of a phase, in batches no larger than one device's part of a step."""
        size = recipe.batch_size // (accelerator.num_processes * recipe.gradient_accumulation)
        return cls(held_out_batches(recipe.data, max(1, size), recipe.log.validation_images))

    @torch.inference_mode()
    def run(
        self, trainer: Trainer, stop: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, float], Tensor] | None:
        """Reconstruct with the EMA weights and the posterior's mode.

        Args:
            trainer: of the phase.
            stop: called before each batch; True ends the validation.

        Returns:
            `validation/psnr` (dB), `validation/ssim` (if images have at least 11 x 11 pixels) and,
            with a perceptual loss, `validation/perceptual`, as means over images; and a picture,
            uint8 [3, H, W], of originals over reconstructions. None if stopped.
        """
        model, perceptual = _averaged(trainer), trainer.objective.perceptual
        columns: dict[str, list[Tensor]] = {}
        pairs: list[tuple[Tensor, Tensor]] = []
        for batch in self.batches:
            if stop():
                return None
            source = batch.images.to(trainer.accelerator.device)
            images = to_float(source)
            decoded = to_uint8(model(images, sample_posterior=False).reconstruction)
            found = {"psnr": psnr(source, decoded)}
            if min(source.shape[-2:]) >= TAPS:  # SSIM's window
                found["ssim"] = ssim(source, decoded)
            if perceptual is not None:
                found["perceptual"] = perceptual(images, to_float(decoded))
            for name, values in found.items():
                columns.setdefault(f"validation/{name}", []).append(values)
            pairs += zip(batch.images, decoded.cpu(), strict=True)
        means = {name: torch.cat(parts).double().mean().item() for name, parts in columns.items()}
        shown = pairs[:: max(1, -(-len(pairs) // PICTURES))]  # evenly spaced: neighbors are often similar
        return means, image_grid([*zip(*shown, strict=True)])


def _averaged(trainer: Trainer) -> Autoencoder:
    """A model that shares the EMA weights, built without drawing random numbers."""
    with torch.device("meta"):
        model = build(trainer.raw_autoencoder.config)
    model.load_state_dict(trainer.ema.state_dict(), assign=True)
    return model.to(memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]

"""The loop around the training step: data in; metrics, pictures and checkpoints out; clean stops."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from latentae.data.loader import Batch, TrainLoader
from latentae.data.streaming import StreamLoader
from latentae.errors import Interrupted, TrainingError
from latentae.evaluation.images import pil_image, write_png
from latentae.progress import Progress, say
from latentae.training.checkpoint import save_checkpoint
from latentae.training.reporting import MetricsLog
from latentae.training.signals import StopFlag
from latentae.training.steps import Trainer
from latentae.training.validation import Validation

__all__ = ["run_loop"]


class Clock:
    """Fires each time the number of images seen passes a multiple of `every`."""

    def __init__(self, every: int) -> None:
        self.every = max(1, every)

    def due(self, before: int, now: int) -> bool:
        """Whether a multiple of `every` lies in (before, now]."""
        return now // self.every > before // self.every


def run_loop(
    trainer: Trainer, loader: TrainLoader | StreamLoader, run: Path, validation: Validation, log: MetricsLog | None
) -> None:
    """Train until the recipe's images have been seen, then save the last state.

    Args:
        trainer: networks, with a restored state where a run goes on.
        loader: this process's data, at the matching position.
        run: the run folder.
        validation: held-out images (may be none).
        log: where metrics go; None on all processes but the first.

    Raises:
        Interrupted: a signal came; the state was saved first.
        TrainingError: a loss became NaN or infinite.
    """
    recipe, state = trainer.recipe, trainer.state
    checkpoints = Clock(recipe.checkpoint_every_images)
    metrics = Clock(recipe.log.metrics_every_images or -(-recipe.images // 200))
    validations = Clock(recipe.log.validation_every_images or -(-recipe.images // 10))
    main = trainer.accelerator.is_main_process
    batches = iter(loader)
    with (
        StopFlag(announce=main) as stop,
        Progress("training", recipe.images, initial=min(state.images_seen, recipe.images), quiet=not main) as progress,
    ):
        timer = Timer()
        while not trainer.finished:
            before = state.images_seen
            terms = trainer.update(_parts(batches, recipe.gradient_accumulation, timer))
            progress.advance(min(recipe.batch_size, recipe.images - before))
            if metrics.due(before, state.images_seen) or state.step == 1:
                values = _report(trainer, terms, timer, log)
                progress.advance(0, note=f"loss {values['loss/total']:.4f}")
            if validations.due(before, state.images_seen) and not trainer.finished:
                _validate(trainer, validation, run, log)
                timer.restart()
            stopping = _agreed(trainer, stop.requested)
            if stopping or checkpoints.due(before, state.images_seen) or trainer.finished:
                _checkpoint(trainer, run, loader)
                timer.restart()
            if stopping and not trainer.finished:
                raise Interrupted(f"stopped at image {state.images_seen} of {recipe.images}; the same command goes on from there")
        _validate(trainer, validation, run, log)


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


def _parts(batches: Iterator[Batch], count: int, timer: Timer) -> tuple[Tensor, ...]:
    """This process's share of a global batch, cut into accumulation steps."""
    start = time.monotonic()
    images = next(batches).images
    timer.waited += time.monotonic() - start
    timer.images += len(images)
    return images.chunk(count)


def _agreed(trainer: Trainer, requested: bool) -> bool:
    """Whether any process was asked to stop: all must leave the loop at the same step."""
    if trainer.accelerator.num_processes == 1:
        return requested
    flag = torch.tensor(float(requested), device=trainer.accelerator.device)
    return bool(trainer.accelerator.reduce(flag, "sum").item() > 0)  # pyright: ignore


def _report(trainer: Trainer, terms: dict[str, Tensor], timer: Timer, log: MetricsLog | None) -> dict[str, float]:
    """Average the terms over processes, write them, and stop a run whose loss is no number."""
    stacked = torch.stack([value.float() for value in terms.values()])
    if trainer.accelerator.num_processes > 1:
        stacked = trainer.accelerator.reduce(stacked, "mean")
    values = dict(zip(terms, stacked.tolist(), strict=True))  # pyright: ignore
    values |= timer.read(trainer.accelerator.num_processes)
    values["lr"] = trainer.optimizer.param_groups[0]["lr"]
    values["time"] = time.time()
    if trainer.accelerator.device.type == "cuda":
        values["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if log is not None:
        log.write(trainer.state.step, trainer.state.images_seen, values)
    bad = [name for name, value in values.items() if name.startswith(("loss/", "gradient_norm/")) and not math.isfinite(value)]
    if bad:
        raise TrainingError(
            f"{bad[0]} is not finite at step {trainer.state.step}; lower --optimizer.lr (now {values['lr']:.3g}) or check the data, "
            "then resume from the last checkpoint"
        )
    return values


def _validate(trainer: Trainer, validation: Validation, run: Path, log: MetricsLog | None) -> None:
    """Measure on the first process; the others wait."""
    if log is not None and validation.batches:
        values, picture = validation.run(trainer)
        log.write(trainer.state.step, trainer.state.images_seen, values)
        write_png(run / "samples" / f"{trainer.state.images_seen:09}.png", picture)
        log.picture(trainer.state.images_seen, pil_image(picture))
        quality = f"PSNR {values['validation/psnr']:.2f} dB, SSIM {values['validation/ssim']:.3f}"
        say(f"held out, {trainer.state.images_seen} images seen: {quality}")
    trainer.accelerator.wait_for_everyone()


def _checkpoint(trainer: Trainer, run: Path, loader: TrainLoader | StreamLoader) -> None:
    """The first process writes; its error reaches all."""
    from latentae.training.launch import on_main

    on_main(trainer.accelerator, lambda: save_checkpoint(trainer, run, loader.state_dict()) and None)

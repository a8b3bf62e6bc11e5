"""Validation during training: metrics and a picture of held-out images, with the EMA weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentae.data.loader import Batch, image_batches
from latentae.data.options import DataOptions
from latentae.data.shard_files import expand_shards
from latentae.data.streaming import streams
from latentae.data.transforms import to_float, to_uint8
from latentae.measures.metrics import TAPS, psnr, ssim
from latentae.models.base import Autoencoder
from latentae.models.config import build
from latentae.pages.images import image_grid
from latentae.progress import say
from latentae.training.recipe import Recipe
from latentae.training.steps import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["LARGEST_BATCH", "Validation", "held_out_batches"]

PICTURES = 8
LARGEST_BATCH = 8  # one process validates, and a global batch may be too large for it


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
        return means, image_grid([[_rgb(a) for a, _ in shown], [_rgb(b) for _, b in shown]])


def _averaged(trainer: Trainer) -> Autoencoder:
    """A model that shares the EMA weights, built without drawing random numbers."""
    with torch.device("meta"):
        model = build(trainer.raw_autoencoder.config)
    model.load_state_dict(trainer.ema.state_dict(), assign=True)
    return model.to(memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]


def _rgb(image: Tensor) -> Tensor:
    """An image [1, 3 or 4 channels, H, W] for display: gray as RGB, without alpha."""
    return image.expand(3, -1, -1) if len(image) == 1 else image[:3]

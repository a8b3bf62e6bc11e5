"""A look at held-out images while training, with the averaged weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentae.data.loader import Batch, image_batches
from latentae.data.options import DataOptions
from latentae.data.shard_files import expand_shards
from latentae.data.streaming import streams
from latentae.data.transforms import to_float, to_uint8
from latentae.measures.metrics import TAPS, psnr, ssim
from latentae.models.architectures import build
from latentae.models.base import Autoencoder
from latentae.pages.images import image_grid
from latentae.progress import say
from latentae.training.steps import Trainer

__all__ = ["Validation", "held_out_batches"]

PICTURES = 8
LARGEST_BATCH = (
    8  # one process measures, and a global batch is cut over many; eight fill a device well enough
)


def held_out_batches(options: DataOptions, batch_size: int, limit: int) -> list[Batch]:
    """The held-out images of a recipe, resized and centre-cropped; empty where there are none.

    Args:
        options: the `[data]` table of the phase.
        batch_size: images of a batch, at most; no more than `LARGEST_BATCH` are.
        limit: images in all.

    Raises:
        DataError: the shards that were named can't be read.
    """
    if options.validation == "none":
        return []
    auto = options.validation == "auto"
    shards = expand_shards(str(options.shards) if auto else options.validation)
    fraction = options.validation_fraction if auto else None
    if auto and streams(shards, options.index):
        say(
            "validation: remote shards without an index have no held-out slice; name shards with --data.validation, or index these"
        )
        return []
    index, channels = (options.index if auto else None), options.channels
    found = image_batches(
        shards,
        options.resolution,
        min(batch_size, LARGEST_BATCH),
        limit=limit,
        only_held_out=fraction,
        channels=channels,
        index=index,
        max_pixels=options.max_pixels,
    )
    batches = list(found)
    if not batches:
        say(
            "validation: the held-out slice is empty, so there is none; name shards with --data.validation or hold out more"
        )
    return batches


@dataclass
class Validation:
    """Metrics and a picture of a fixed set of held-out images.

    Attributes:
        batches: the images, kept in memory (they are few).
    """

    batches: list[Batch]

    @torch.inference_mode()
    def run(
        self, trainer: Trainer, stop: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, float], Tensor] | None:
        """Reconstruct with the EMA weights and the posterior's mode. The weights in training are not measured: it would take twice
        the time, and nobody uses them.

        Args:
            trainer: of the phase.
            stop: asked before each batch.

        Returns:
            `validation/psnr` (dB), `validation/ssim` (of images of 11 x 11 pixels or more) and, with a perceptual loss,
            `validation/perceptual`; means over images. And a picture, uint8 [3, H, W], originals over reconstructions. None where
            `stop` said so: half a set is no measurement.
        """
        model = _averaged(trainer)
        columns: dict[str, list[Tensor]] = {}
        pairs: list[tuple[Tensor, Tensor]] = []
        for batch in self.batches:
            if stop():
                return None
            source = batch.images.to(trainer.accelerator.device)
            images = to_float(source)
            made = to_uint8(model(images, sample_posterior=False).reconstruction)
            columns.setdefault("psnr", []).append(psnr(source, made))
            if min(source.shape[-2:]) >= TAPS:  # a digit of 8 x 8 is smaller than SSIM's window
                columns.setdefault("ssim", []).append(ssim(source, made))
            if trainer.objective.perceptual is not None:
                columns.setdefault("perceptual", []).append(
                    trainer.objective.perceptual(images, to_float(made))
                )
            pairs += zip(batch.images, made.cpu(), strict=True)
        values = {
            f"validation/{name}": torch.cat(parts).double().mean().item() for name, parts in columns.items()
        }
        shown = pairs[
            :: max(1, -(-len(pairs) // PICTURES))
        ]  # evenly spaced: neighbours often come from one source
        return values, image_grid([[_rgb(a) for a, _ in shown], [_rgb(b) for _, b in shown]])


def _averaged(trainer: Trainer) -> Autoencoder:
    """A model on the EMA weights, which it borrows where they lie; made without drawing random numbers."""
    with torch.device("meta"):
        model = build(trainer.raw_autoencoder.config)
    model.load_state_dict(trainer.ema.state_dict(), assign=True)
    return model.to(memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]


def _rgb(image: Tensor) -> Tensor:
    """A image [1, 3 or 4 channels, H, W] as a picture can show it: gray three times, without alpha."""
    return image.expand(3, -1, -1) if len(image) == 1 else image[:3]

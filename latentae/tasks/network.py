"""The autoencoder of a task: it takes images of 8 or 16 bits and any size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from latentae.data.transforms import pad_to_multiple, to_float, to_uint8
from latentae.device import choose_device
from latentae.errors import ModelError
from latentae.models.base import Autoencoder, DiagonalGaussian
from latentae.models.pretrained import load_model, resolve_model
from latentae.tasks.inputs import Images, Item, Labels, no_label
from latentae.tasks.options import TaskOptions

__all__ = ["Batch", "Network"]

_DIVERGED = "has NaN or infinite values; the model has diverged, use an earlier checkpoint"


@dataclass(frozen=True)
class Batch:
    """Consecutive images of one size."""

    items: list[Item]
    images: Tensor
    """uint8 or uint16 [B, C, H, W]."""


class Network:
    """An autoencoder in fp32, for inference, and the image sizes that fit it.

    Args:
        options: model, weights, device and resolution.
        batch_size: maximum number of images per batch.
        reconstructs: whether the task needs as many channels out as in.

    Raises:
        ModelError: no such model, or channels that image files do not have.
        ImageError: a resolution that is not a multiple of f.
    """

    def __init__(self, options: TaskOptions, batch_size: int = 16, *, reconstructs: bool = False) -> None:
        self.options, self.batch_size = options, batch_size
        self.source = resolve_model(options.model, options.weights)
        self.device = choose_device(options.device)
        self.config, self.fingerprint = self.source.config, self.source.fingerprint
        self.source.check_channels(decodes=reconstructs)
        if options.resolution is not None:
            self.source.check_side(options.resolution)

    @cached_property
    def model(self) -> Autoencoder:
        """In evaluation mode on the device; loaded on first use, which a finished job skips."""
        return load_model(self.options.model, self.options.weights, self.device)[0]

    @property
    def side(self) -> int:
        """The resolution, or else the model's own.

        Raises:
            ImageError: it is not a multiple of f.
        """
        side = self.options.resolution or self.source.resolution
        self.source.check_side(side)
        return side

    def batches(
        self,
        images: Images,
        numbers: Sequence[int],
        labels: Labels = no_label,
        *,
        resolution: int | None = None,
        wanted: Callable[[str], bool] = lambda _: True,
    ) -> Iterator[Batch]:
        """Decode images and join neighbors of one size and depth; the order stays the same.

        `resolution` defaults to the options' resolution; for the other arguments see
        `Images.items`.
        """
        side, channels = resolution or self.options.resolution, self.config.in_channels
        items = images.items(numbers, labels, channels=channels, resolution=side, wanted=wanted)
        for _, group in itertools.groupby(items, key=lambda item: (item.image.shape, item.image.dtype)):
            while chunk := list(itertools.islice(group, self.batch_size)):
                yield Batch(chunk, torch.stack([item.image for item in chunk]))

    def pixels(self, batch: Batch) -> Tensor:
        """Images as the model takes them: float [B, C, H, W] in [-1, 1] on its device."""
        return to_float(batch.images.to(self.device))

    @torch.inference_mode()
    def encode(self, batch: Batch) -> DiagonalGaussian:
        """Raw posteriors [B, z, ceil(H/f), ceil(W/f)] of images, padded by reflection.

        Raises:
            ModelError: one is not finite.
        """
        posterior = self.model.encode(pad_to_multiple(self.pixels(batch), self.config.downsampling))
        _check_finite(posterior.mean, "latent", batch)
        return posterior

    @torch.inference_mode()
    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Posterior means [B, z, h, w] and reconstructions [B, C, H, W], clamped to [-1, 1].

        Raises:
            ModelError: one is not finite.
        """
        mean = self.encode(batch).mode()
        height, width = batch.images.shape[2:]
        images = self.model.decode(mean)[..., :height, :width]
        _check_finite(images, "reconstruction", batch)
        return mean, images.clamp(-1.0, 1.0)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Tensor]:
        """Decode raw latents [N, z, h, w] to uint8 [C, f*h, f*w] images on the CPU.

        Raises:
            ModelError: one is not finite.
        """
        images: list[Tensor] = []
        for part in latents.to(torch.float32).split(self.batch_size):
            decoded = self.model.decode(part.to(self.device))
            if not decoded.isfinite().all():
                raise ModelError(f"a decoded image {_DIVERGED}")
            images += to_uint8(decoded).cpu().unbind()
        return images


def _check_finite(values: Tensor, what: str, batch: Batch) -> None:
    fine = values.isfinite().flatten(1).all(1)
    if not fine.all():
        raise ModelError(f"the {what} of {batch.items[int((~fine).nonzero()[0])].key} {_DIVERGED}")

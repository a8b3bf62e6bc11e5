"""An autoencoder on batches of images as they come: 8 or 16 bits, any size."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from latentae.data.transforms import pad_to_multiple, to_float, to_uint8
from latentae.device import choose_device
from latentae.errors import ModelError, RecipeError
from latentae.models.base import Autoencoder
from latentae.models.posterior import DiagonalGaussian
from latentae.models.pretrained import load_model, resolve_model
from latentae.tasks.inputs import Item

__all__ = ["Batch", "Network", "batches"]


@dataclass(frozen=True)
class Batch:
    """Consecutive images of one size."""

    items: list[Item]
    images: Tensor
    """uint8 or uint16 [B, C, H, W]."""


def batches(items: Iterable[Item], size: int) -> Iterator[Batch]:
    """Join neighbours of one size and depth, `size` at most; no image waits for others, so order and memory stay as they are."""
    for _, group in itertools.groupby(items, key=lambda item: (item.image.shape, item.image.dtype)):
        while chunk := list(itertools.islice(group, size)):
            yield Batch(chunk, torch.stack([item.image for item in chunk]))


class Network:
    """An autoencoder, loaded, and the sizes that fit it. Everything is fp32 and nothing differentiable.

    Args:
        model: run folder, checkpoint, exported folder, or whatever else names a model.
        weights: "ema" or "raw".
        device: "auto", "cpu", "cuda" or "cuda:N".
        reconstructs: whether the task compares images with reconstructions, which takes as many channels out as in.

    Raises:
        ModelError: there is none, or its channels are not those of image files.
    """

    def __init__(self, model: str | Path, weights: str, device: str, *, reconstructs: bool = False) -> None:
        self.source, self.device = resolve_model(model, weights), choose_device(device)
        self.config = self.source.config
        self.channels, self.downsampling = self.config.in_channels, self.config.downsampling
        self.source.check_channels(decodes=reconstructs)
        self._named = (model, weights)

    @cached_property
    def model(self) -> Autoencoder:
        """In evaluation mode on the device; loaded on first use, as a finished job needs none."""
        return load_model(*self._named, self.device)[0]

    @property
    def fingerprint(self) -> str:
        """Hex digest of weights and config."""
        return self.source.fingerprint

    def check(self, resolution: int | None, batch_size: int) -> None:
        """Refuse options that can't be used.

        Raises:
            ImageError: a resolution that the downsampling does not divide.
            RecipeError: a batch size below 1.
        """
        if resolution is not None:
            self.source.check_side(resolution)
        if batch_size < 1:
            raise RecipeError(f"batch_size is {batch_size}, expected 1 or more")

    @torch.inference_mode()
    def encode(self, batch: Batch) -> DiagonalGaussian:
        """The posteriors of images, padded by reflection to multiples of f: [B, z, ceil(H/f), ceil(W/f)], raw.

        Raises:
            ModelError: one is not finite; its key is named.
        """
        posterior = self.model.encode(pad_to_multiple(self.pixels(batch), self.downsampling))
        self._check_finite(posterior.mean, "latent", batch)
        return posterior

    @torch.inference_mode()
    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The posterior means [B, z, h, w], and what they decode to, cut to the images' size: float [B, C, H, W], clamped to [-1, 1].

        Raises:
            ModelError: one is not finite; its key is named.
        """
        mean = self.encode(batch).mode()
        height, width = batch.images.shape[2:]
        images = self.model.decode(mean)[..., :height, :width]
        self._check_finite(images, "reconstruction", batch)
        return mean, images.clamp(-1.0, 1.0)

    @torch.inference_mode()
    def decode(self, latents: Tensor, batch_size: int = 16) -> list[Tensor]:
        """Raw latents [N, z, h, w] -> uint8 [C, f*h, f*w] images on the CPU.

        Raises:
            ModelError: one is not finite.
        """
        images: list[Tensor] = []
        for part in latents.to(torch.float32).split(batch_size):
            decoded = self.model.decode(part.to(self.device))
            if not decoded.isfinite().all():
                raise ModelError(
                    "a decoded image has NaN or infinite values; the model has diverged, use an earlier checkpoint"
                )
            images += to_uint8(decoded).cpu().unbind()
        return images

    def pixels(self, batch: Batch) -> Tensor:
        """Images as the model takes them: float [B, C, H, W] in [-1, 1] on its device."""
        return to_float(batch.images.to(self.device))

    def _check_finite(self, values: Tensor, what: str, batch: Batch) -> None:
        fine = values.isfinite().flatten(1).all(1)
        if not fine.all():
            key = batch.items[int((~fine).nonzero()[0])].key
            raise ModelError(
                f"the {what} of {key} has NaN or infinite values; the model has diverged, use an earlier checkpoint"
            )

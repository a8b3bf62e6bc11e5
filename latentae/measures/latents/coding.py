"""A model on a few images that are held in memory, a batch at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentae.data.transforms import to_uint8
from latentae.measures.metrics import psnr
from latentae.models.base import Autoencoder

__all__ = ["Coder", "finite_mean", "reconstruction_psnr"]


@dataclass(frozen=True)
class Coder:
    """Encode and decode tensors on the CPU with a model that may be elsewhere.

    Attributes:
        model: in evaluation mode, on `device`.
        device: where it is.
        batch_size: images at a time.
    """

    model: Autoencoder
    device: torch.device
    batch_size: int

    def parts(self, count: int) -> list[slice]:
        """`count` images cut into batches."""
        return [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Posterior means [B, z, h, w] in fp32 of images [B, C, H, W] in [-1, 1], `batch_size` at a time."""
        return torch.cat(
            [self.model.encode(images[p].to(self.device)).mean.float().cpu() for p in self.parts(len(images))]
        )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, C, H, W], about [-1, 1], in fp32 of raw latents [B, z, h, w], `batch_size` at a time."""
        return torch.cat(
            [self.model.decode(latents[p].to(self.device)).float().cpu() for p in self.parts(len(latents))]
        )


def reconstruction_psnr(made: Tensor, images: Tensor) -> list[float]:
    """PSNR of each image in dB after rounding to 8 bits: infinite where both are the same, NaN where `made` is not finite.

    Args:
        made: float [B, C, H, W], about [-1, 1].
        images: uint8, the same shape.
    """
    bad = ~made.isfinite().flatten(1).all(1)
    return psnr(to_uint8(made.nan_to_num()), images).masked_fill(bad, math.nan).tolist()


def finite_mean(values: Iterable[float]) -> float | None:
    """The mean of those that are finite; None if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None

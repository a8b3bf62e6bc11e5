"""A model whose latents are known, images of one color each, and features of color."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from latentae.data.loader import Batch
from latentae.data.transforms import to_float
from latentae.measures.frechet import Extractor
from latentae.models.base import Autoencoder, DiagonalGaussian
from latentae.models.latent_statistics import LatentStatistics, merge


class Patches(Autoencoder):
    """An autoencoder whose latents are the pixels of 4 x 4 blocks, unchanged."""

    def __init__(self, channels: int = 3, logvar: float = -30.0) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            downsampling=4, latent_channels=16 * channels, in_channels=channels, out_channels=channels
        )
        self.logvar, self.offset, self.broken = logvar, 0.0, False

    def _encode(self, x: Tensor, keep_features: bool) -> tuple[DiagonalGaussian, None]:
        mean = pixel_unshuffle(x, 4) + self.offset
        return DiagonalGaussian(torch.cat([mean, torch.full_like(mean, self.logvar)], dim=1)), None

    def _decode(self, z: Tensor, keep_features: bool) -> tuple[Tensor, None]:
        return pixel_shuffle(z, 4) * (torch.nan if self.broken else 1.0), None


def moods(count: int, size: int = 16, channels: int = 3, seed: int = 0) -> Tensor:
    """Images of one normally distributed color each, with a little noise: uint8 [N, C, s, s]."""
    generator = torch.Generator().manual_seed(seed)
    colors = 128 + 35 * torch.randn(count, channels, 1, 1, generator=generator)
    noise = torch.randn(count, channels, size, size, generator=generator)
    return (colors + 2 * noise).round().clamp(0, 255).to(torch.uint8)


def batches(images: Tensor, size: int) -> Iterator[Batch]:
    keys = [f"{number:03}" for number in range(len(images))]
    for start in range(0, len(images), size):
        yield Batch(tuple(keys[start : start + size]), images[start : start + size])


def statistics_of(model: Autoencoder, images: Tensor) -> LatentStatistics:
    with torch.no_grad():
        posterior = model.encode(to_float(images))
    each = [LatentStatistics.of(*pair) for pair in zip(posterior.mean, posterior.logvar, strict=True)]
    return merge(each, posterior.mean.shape[1])


def look(images: Tensor) -> Tensor:
    """Mean and spread of each color, [B, 6]."""
    values = images.float() / 64
    return torch.cat([values.mean(dim=(2, 3)), values.std(dim=(2, 3))], dim=1)


MOODS = Extractor("FD-moods", 6, "mean and spread of each color", "a test", look)

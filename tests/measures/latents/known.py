"""A model whose behavior is known, and moments of latents."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentae.models.base import Autoencoder, DiagonalGaussian


class Blocks(Autoencoder):
    """Encodes the mean of f x f pixels and decodes f x f equal pixels; the identity for f = 1."""

    def __init__(self, f: int = 1, channels: int = 3) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            downsampling=f, latent_channels=channels, in_channels=channels, out_channels=channels
        )
        self.gain = nn.Parameter(torch.ones(()))

    def _encode(self, x, keep_features):
        mean = F.avg_pool2d(x, self.config.downsampling) * self.gain
        return DiagonalGaussian(torch.cat([mean, torch.full_like(mean, -30.0)], 1)), None

    def _decode(self, z, keep_features):
        return self.gain * F.interpolate(z, scale_factor=self.config.downsampling, mode="nearest"), None


def blocks(f: int = 1, channels: int = 3) -> Blocks:
    model = Blocks(f, channels)
    model.eval()
    return model


def moments(count: int, channels: int = 3, side: int = 8, seed: int = 0) -> Tensor:
    """Moments [B, 2z, h, w] of correlated channels with different means and spreads."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator)
    noise = torch.randn(count, channels, side, side, generator=generator)
    mean = torch.einsum("ij,bjhw->bihw", mixing, noise) + 3 * torch.randn(channels, 1, 1, generator=generator)
    return torch.cat([mean, torch.randn(mean.shape, generator=generator) - 1], 1)

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentae.models.base import Autoencoder
from latentae.models.posterior import DiagonalGaussian


class Blocks(Autoencoder):
    """An autoencoder whose behaviour is known: the latent is the mean of f x f pixels, decoded as so many equal pixels.

    With f = 1 it is the identity.
    """

    def __init__(self, f: int = 1, channels: int = 3) -> None:
        super().__init__()
        self.config = SimpleNamespace(downsampling=f, latent_channels=channels, in_channels=channels, out_channels=channels)
        self.gain = nn.Parameter(torch.ones(()))

    def _encode(self, x, keep_features):
        self._check_image(x)
        mean = F.avg_pool2d(x, self.config.downsampling) * self.gain
        return DiagonalGaussian(torch.cat([mean, torch.full_like(mean, -30.0)], 1)), None

    def _decode(self, z, keep_features):
        self._check_latent(z)
        return self.gain * F.interpolate(z, scale_factor=self.config.downsampling, mode="nearest"), None


@pytest.fixture(scope="session")
def blocks() -> Callable[..., Autoencoder]:
    return lambda f=1, channels=3: Blocks(f, channels).eval()


@pytest.fixture(scope="session")
def moments() -> Callable[..., Tensor]:
    """Moments [B, 2z, h, w] with channels of different mean and spread that depend on each other."""

    def make(count: int, channels: int = 3, side: int = 8, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(channels, channels, generator=generator)
        noise = torch.randn(count, channels, side, side, generator=generator)
        mean = torch.einsum("ij,bjhw->bihw", mixing, noise) + 3 * torch.randn(channels, 1, 1, generator=generator)
        return torch.cat([mean, torch.randn(mean.shape, generator=generator) - 1], 1)

    return make

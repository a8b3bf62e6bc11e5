"""The distribution that an encoder predicts for a latent."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DiagonalGaussian"]


class DiagonalGaussian:
    """A normal distribution with a diagonal covariance for each latent element.

    Args:
        moments: [B, 2z, h, w], mean and log-variance stacked over channels. Half precision is
            widened to fp32 and the log-variance is clamped to [-30, 20], as in LDM.
    """

    SMALLEST_LOGVAR = -30.0
    """A standard deviation of 3e-7: a sample equals the mean."""

    def __init__(self, moments: Tensor) -> None:
        moments = moments.to(torch.promote_types(moments.dtype, torch.float32))
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(self.SMALLEST_LOGVAR, 20.0)

    @classmethod
    def of_mean(cls, mean: Tensor) -> DiagonalGaussian:
        """The posterior of a deterministic encoder: `mean` [B, z, h, w], smallest variance."""
        return cls(torch.cat([mean, torch.full_like(mean, cls.SMALLEST_LOGVAR)], dim=1))

    @property
    def std(self) -> Tensor:
        """Standard deviation, [B, z, h, w]."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise (Kingma & Welling 2013, eq. 4), [B, z, h, w], noise drawn if None."""
        if noise is None:
            noise = torch.randn(
                self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype
            )
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """The most likely latent: the mean, [B, z, h, w]."""
        return self.mean

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) of each image's latent, [B] (Kingma & Welling 2013, appendix B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))

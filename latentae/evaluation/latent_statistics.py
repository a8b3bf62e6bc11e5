"""What a latent space looks like in numbers: per-channel mean and spread, KL, and the scaling a diffusion model needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentae.models.posterior import DiagonalGaussian

__all__ = ["LatentStatistics"]


@dataclass
class LatentStatistics:
    """Running fp64 sums over posteriors; memory does not grow with their number.

    The statistics are those of posterior samples z = mean + sigma eps, without drawing any:
    E[z] = E[mean], Var[z] = Var[mean] + E[sigma^2] (law of total variance).
    """

    count: int = 0
    images: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    std: Tensor | float = 0.0
    kl: float = 0.0
    largest: float = 0.0

    def add(self, posterior: DiagonalGaussian) -> None:
        """Count the latents [B, z, h, w] of a batch."""
        mean, std = posterior.mean.double(), posterior.std.double()
        self.total = self.total + mean.sum((0, 2, 3)).cpu()
        self.squares = self.squares + (mean.square() + std.square()).sum((0, 2, 3)).cpu()
        self.std = self.std + std.sum((0, 2, 3)).cpu()
        self.count += mean[:, 0].numel()
        self.images += len(mean)
        self.kl += float(posterior.kl().double().sum())
        self.largest = max(self.largest, float(mean.abs().max()))

    def result(self) -> dict[str, Any]:
        """Per-channel and overall statistics as plain JSON values.

        scaling_factor = 1 / std over all elements of all images (Rombach et al. 2022, app. G); shift_factor = their mean. A
        diffusion model is given (latent - shift_factor) * scaling_factor.
        """
        mean, square = torch.as_tensor(self.total) / self.count, torch.as_tensor(self.squares) / self.count
        overall = float(mean.mean())
        std = max(float(square.mean()) - overall**2, 0.0) ** 0.5
        return {
            "channel_mean": mean.tolist(),
            "channel_std": (square - mean.square()).clamp(min=0).sqrt().tolist(),
            "channel_posterior_std": (torch.as_tensor(self.std) / self.count).tolist(),
            "mean": overall,
            "std": std,
            "largest_absolute_mean": self.largest,
            "kl_nats_per_image": self.kl / self.images,
            "scaling_factor": 1 / std if std > 0 else None,
            "shift_factor": overall,
        }

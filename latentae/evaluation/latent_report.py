"""What a latent space looks like in numbers: per-channel mean and spread, KL, and the scaling a diffusion model needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentae.models.latent_statistics import LatentStatistics, merge
from latentae.models.posterior import DiagonalGaussian

__all__ = ["LatentReport"]


@dataclass
class LatentReport:
    """The statistics of posterior samples, and what only a report asks for; memory does not grow with the number of latents."""

    statistics: LatentStatistics | None = None
    std: Tensor | float = 0.0
    kl: float = 0.0
    largest: float = 0.0

    def add(self, posterior: DiagonalGaussian) -> None:
        """Count the latents [B, z, h, w] of a batch."""
        each = [LatentStatistics.of(mean, logvar) for mean, logvar in zip(posterior.mean, posterior.logvar, strict=True)]
        known = [] if self.statistics is None else [self.statistics]
        self.statistics = merge([*known, *each], posterior.mean.shape[1])
        self.std = self.std + posterior.std.double().sum((0, 2, 3)).cpu()
        self.kl += float(posterior.kl().double().sum())
        self.largest = max(self.largest, float(posterior.mean.abs().max()))

    def result(self) -> dict[str, Any]:
        """Per-channel and overall statistics as plain JSON values (see `LatentStatistics.summary` for the scaling)."""
        assert self.statistics is not None
        summary, count = self.statistics.summary(), self.statistics.count
        scale = summary["scaling_factor"]
        return {
            "channel_mean": summary["latents_mean"],
            "channel_std": summary["latents_std"],
            "channel_posterior_std": (torch.as_tensor(self.std) / count).tolist(),
            "mean": summary["shift_factor"],
            "std": 0.0 if scale is None else 1 / scale,
            "largest_absolute_mean": self.largest,
            "kl_nats_per_image": self.kl / self.statistics.samples,
            "scaling_factor": scale,
            "shift_factor": summary["shift_factor"],
        }

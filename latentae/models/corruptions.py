"""Corruptions of a latent between encoder and decoder."""

from __future__ import annotations

from torch import Tensor

__all__ = ["mix_noise"]


def mix_noise(latent: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """z' = (1 - t) z + t noise (l-DeTok, Yang et al. 2025, eq. 2).

    Args:
        latent: z, [B, z, h, w].
        noise: normal, of the standard deviation wanted (l-DeTok: 3), [B, z, h, w].
        share: t in [0, 1] for each sample, [B].
    """
    t = share.view(-1, 1, 1, 1).to(latent.dtype)
    return (1 - t) * latent + t * noise.to(latent.dtype)

"""A loss on fine detail."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["wavelet"]


def wavelet(x: Tensor, y: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Charbonnier loss sqrt(d^2 + epsilon^2) averaged over the high-frequency Haar bands of each image, [B, C, H, W] x 2 -> [B].

    Source: LiteVAE (Sadat et al. 2024, arXiv 2405.14477). One level of the orthonormal transform; the bands LH, HL and HH
    have the size of half an image. An odd side is completed by its last row or column, which adds no detail.
    """
    d = x - y  # the transform is linear
    height, width = d.shape[-2:]
    if height % 2 or width % 2:
        d = F.pad(d, (0, width % 2, 0, height % 2), mode="replicate")
    top, bottom = d[..., ::2, :], d[..., 1::2, :]
    low, high = (top + bottom) * 0.5, (top - bottom) * 0.5
    bands = [
        low[..., ::2] - low[..., 1::2],  # detail from left to right
        high[..., ::2] + high[..., 1::2],  # from top to bottom
        high[..., ::2] - high[..., 1::2],  # diagonal
    ]
    return torch.stack(
        [torch.sqrt(band.square() + epsilon**2).flatten(1).mean(dim=1) for band in bands]
    ).mean(dim=0)

"""Pixel losses between reconstruction and image, one value per image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bce", "charbonnier", "l1", "l2", "wavelet", "wide"]


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error over each image, [B, C, H, W] x 2 -> [B]."""
    return (x - y).abs().flatten(1).mean(dim=1)


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error over each image, [B, C, H, W] x 2 -> [B]."""
    return (x - y).square().flatten(1).mean(dim=1)


def charbonnier(x: Tensor, y: Tensor, epsilon: float = 1e-3) -> Tensor:
    """sqrt(d^2 + epsilon^2) averaged over each image, [B, C, H, W] x 2 -> [B].

    Source: Charbonnier et al. 1994; Lai et al. 2017, eq. 3.
    """
    return _charbonnier(x - y, epsilon)


def _charbonnier(d: Tensor, epsilon: float) -> Tensor:
    return torch.sqrt(d.square() + epsilon**2).flatten(1).mean(dim=1)


def wavelet(x: Tensor, y: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Charbonnier loss averaged over high-frequency Haar bands, [B, C, H, W] x 2 -> [B].

    Source: LiteVAE (Sadat et al. 2024, arXiv 2405.14477). One level of the orthonormal transform;
    the bands LH, HL and HH have half the image's size. The last row or column of an odd side is
    repeated, which adds no detail.
    """
    d = x - y  # the transform is linear
    height, width = d.shape[-2:]
    if height % 2 or width % 2:
        d = F.pad(d, (0, width % 2, 0, height % 2), mode="replicate")
    top, bottom = d[..., ::2, :], d[..., 1::2, :]
    low, high = (top + bottom) * 0.5, (top - bottom) * 0.5
    bands = [
        low[..., ::2] - low[..., 1::2],  # horizontal detail
        high[..., ::2] + high[..., 1::2],  # vertical
        high[..., ::2] - high[..., 1::2],  # diagonal
    ]
    return torch.stack([_charbonnier(band, epsilon) for band in bands]).mean(dim=0)


def bce(x: Tensor, y: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Mean binary cross entropy in nats, -t log p - (1 - t) log(1 - p), [B, C, H, W] x 2 -> [B].

    p = (x + 1) / 2 is the decoder's output as a probability; t = (y + 1) / 2 is the target, clamped
    to [epsilon, 1 - epsilon]. Where p is outside that interval the loss continues along its
    tangent. It is convex and bounded below, and its gradient is continuous and at most about 1 /
    epsilon.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    p, t = ((v.to(dtype) + 1.0) / 2.0 for v in (x, y))  # in half precision 1 - epsilon would round to 1
    t, inside = t.clamp(epsilon, 1.0 - epsilon), p.clamp(epsilon, 1.0 - epsilon)
    slope = (inside - t) / (inside * (1.0 - inside))
    loss = -t * torch.log(inside) - (1.0 - t) * torch.log1p(-inside) + slope * (p - inside)
    return loss.flatten(1).mean(dim=1)


def wide(x: Tensor) -> Tensor:
    """Half precision as fp32; fp32 and fp64 unchanged.

    Losses and their gradients are computed in at least fp32.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))

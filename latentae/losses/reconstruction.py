"""Pixel losses, one value an image."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bce", "charbonnier", "l1", "l2"]


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error over each image, [B, C, H, W] x 2 -> [B]."""
    return (x - y).abs().flatten(1).mean(dim=1)


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error over each image, [B, C, H, W] x 2 -> [B]."""
    return (x - y).square().flatten(1).mean(dim=1)


def charbonnier(x: Tensor, y: Tensor, epsilon: float = 1e-3) -> Tensor:
    """sqrt(d^2 + epsilon^2) averaged over each image, [B, C, H, W] x 2 -> [B] (Charbonnier et al. 1994; Lai et al. 2017, eq. 3)."""
    return torch.sqrt((x - y).square() + epsilon**2).flatten(1).mean(dim=1)


def bce(x: Tensor, y: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Binary cross entropy in nats, -t log p - (1 - t) log(1 - p) averaged over each image, [B, C, H, W] x 2 -> [B].

    p = (x + 1) / 2 is the decoder's output as a probability, t = (y + 1) / 2 the target, taken into [epsilon, 1 - epsilon]. Outside of
    that interval p is no argument of a logarithm, and the loss goes on along its tangent: convex, with a continuous gradient that is
    largest, at most about 1 / epsilon, where an output is wrong, and bounded below, because no target lies outside.
    """
    wide = torch.promote_types(
        torch.promote_types(x.dtype, y.dtype), torch.float32
    )  # 1 - epsilon is 1 in half precision
    p, t = ((v.to(wide) + 1.0) / 2.0 for v in (x, y))
    t, inside = t.clamp(epsilon, 1.0 - epsilon), p.clamp(epsilon, 1.0 - epsilon)
    slope = (inside - t) / (inside * (1.0 - inside))
    loss = -t * torch.log(inside) - (1.0 - t) * torch.log1p(-inside) + slope * (p - inside)
    return loss.flatten(1).mean(dim=1)

"""Pixel losses, one value an image."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["charbonnier", "l1", "l2"]


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error over each image, [B, C, H, W] x 2 -> [B]."""
    return (x - y).abs().flatten(1).mean(dim=1)


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error over each image, [B, C, H, W] x 2 -> [B]."""
    return (x - y).square().flatten(1).mean(dim=1)


def charbonnier(x: Tensor, y: Tensor, epsilon: float = 1e-3) -> Tensor:
    """sqrt(d^2 + epsilon^2) averaged over each image, [B, C, H, W] x 2 -> [B] (Charbonnier et al. 1994; Lai et al. 2017, eq. 3)."""
    return torch.sqrt((x - y).square() + epsilon**2).flatten(1).mean(dim=1)

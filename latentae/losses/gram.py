"""A loss on texture."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["gram_distance"]


def gram_distance(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    """Squared difference of Gram matrices, averaged over layers: feature maps [B, N, h, w] of two batches of images -> [B].

    E = 1 / (4 N^2 M^2) sum_ij (G_ij - A_ij)^2 a layer, with G = F F^T over the M = h w places, and layers weighted equally
    (Gatys et al. 2016, "Image Style Transfer Using Convolutional Neural Networks", eq. 3 to 5). In at least fp32: entries are sums
    over many places, and their difference is small.
    """
    return torch.stack([_layer(x, y) for x, y in zip(a, b, strict=True)]).mean(dim=0)


def _layer(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        difference = _gram(x) - _gram(y)
        return difference.square().mean(dim=(1, 2)) / 4.0


def _gram(features: Tensor) -> Tensor:
    """F F^T / M, [B, N, N]."""
    f = features.to(torch.promote_types(features.dtype, torch.float32)).flatten(2)
    return f @ f.transpose(1, 2) / f.shape[2]

"""A distance between what a classifier makes of two images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentae.losses.options import ClassifierOptions
from latentae.models.backbone import FrozenBackbone

__all__ = ["ClassifierDistance"]


class ClassifierDistance(nn.Module):
    """Mean squared difference of the logits of a frozen classifier, at the resolution it was trained at.

    Source: the ConvNeXt half of l-DeTok's perceptual loss (Yang et al. 2025, arXiv 2507.15856), which comes from TiTok's training code
    (Yu et al. 2024): images resized to the classifier's own size, logits before the softmax, mean over the classes.

    Raises:
        ModelError, WeightsError, MissingDependencyError: the classifier can't be had; see `FrozenBackbone`.
    """

    def __init__(self, options: ClassifierOptions) -> None:
        super().__init__()
        self.backbone = FrozenBackbone(options.backbone, options.weights)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] x 2 -> [B]."""
        a, b = (
            logits.to(torch.promote_types(logits.dtype, torch.float32))
            for logits in map(self.backbone.logits, (x, y))
        )
        return (a - b).square().mean(dim=1)

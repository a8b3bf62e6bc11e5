"""Alignment of a latent to the features of a frozen network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentae.losses.options import AlignmentOptions
from latentae.losses.reconstruction import wide
from latentae.models.backbone import FrozenBackbone

__all__ = ["AlignmentLoss", "distance_similarity", "marginal_cosine"]

LIMIT = 2**24  # similarities computed at a time: 64 MiB of fp32, 16 latents of 32 x 32


class AlignmentLoss(nn.Module):
    """The VF loss of VA-VAE, `marginal_cosine` + `distance_similarity`.

    Source: Yao et al. 2025, arXiv 2501.01423, section 3.2.

    The projection is learned, a parameter of this module. Features are interpolated to the latent's
    grid and get no gradient.

    Args:
        options: backbone and margins; the training step applies the weight, because it knows the
            adaptive ratio.
        latent_channels: channels z of the latent.

    Raises:
        ModelError, WeightsError, MissingDependencyError: see `FrozenBackbone`.
    """

    def __init__(self, options: AlignmentOptions, latent_channels: int) -> None:
        super().__init__()
        self.options = options
        self.backbone = FrozenBackbone(options.backbone, options.weights)
        self.projection = nn.Conv2d(latent_channels, self.backbone.feature_channels(1)[0], 1, bias=False)

    def forward(self, latent: Tensor, images: Tensor) -> Tensor:
        """Latent [B, z, h, w] of images [B, 3, H, W] in [-1, 1] -> [B]."""
        with torch.no_grad():
            (features,) = self.backbone.features(images)
        with torch.autocast(latent.device.type, enabled=False):  # 8 bits of mantissa are too few for margins
            z, size = wide(latent), latent.shape[-2:]
            f = F.interpolate(wide(features), size=size, mode="bilinear", align_corners=False, antialias=True)
            cosine = marginal_cosine(self.projection(z), f, self.options.cosine_margin)
            return cosine + distance_similarity(z, f, self.options.distance_margin)


def marginal_cosine(projected: Tensor, features: Tensor, margin: float) -> Tensor:
    """relu(1 - margin - cos(W z, f)) averaged over positions, [B, C, h, w] x 2 -> [B]."""
    cosine = (F.normalize(projected, dim=1) * F.normalize(features, dim=1)).sum(dim=1)
    return F.relu(1.0 - margin - cosine).flatten(1).mean(dim=1)


def distance_similarity(latent: Tensor, features: Tensor, margin: float) -> Tensor:
    """relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin) averaged over pairs of positions, -> [B].

    z is the latent before the projection, as in the paper; the authors' code uses it after the
    projection. N positions give N^2 pairs per image. Above `LIMIT` pairs in a batch, rows are
    computed in chunks and again in the backward pass, so that memory grows with N instead of N^2.

    Args:
        latent: [B, z, h, w].
        features: [B, C, h, w].
        margin: difference of similarities that costs nothing.
    """
    z, f = (F.normalize(x.flatten(2), dim=1) for x in (latent, features))
    batch, positions = z.shape[0], z.shape[2]
    rows = max(LIMIT // (batch * positions), 1)
    if rows >= positions:
        return _excess(z, z, f, f, margin) / positions**2
    parts = zip(z.split(rows, dim=2), f.split(rows, dim=2), strict=True)
    sums = [checkpoint(_excess, a, z, b, f, margin, use_reentrant=False) for a, b in parts]
    return torch.stack(sums).sum(dim=0) / positions**2


def _excess(some_z: Tensor, z: Tensor, some_f: Tensor, f: Tensor, margin: float) -> Tensor:
    """Sum over the pairs of some positions with all, [B]."""
    difference = some_z.transpose(1, 2) @ z - some_f.transpose(1, 2) @ f
    return F.relu(difference.abs() - margin).sum(dim=(1, 2))

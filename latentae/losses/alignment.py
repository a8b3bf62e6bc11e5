"""Alignment of a latent to the features of a frozen network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentae.losses.options import AlignmentOptions
from latentae.models.backbone import FrozenBackbone

__all__ = ["AlignmentLoss", "distance_similarity", "marginal_cosine"]

LIMIT = 2**24  # similarities held at a time: 64 MiB of fp32, 16 latents of 32 x 32


class AlignmentLoss(nn.Module):
    """The VF loss of VA-VAE (Yao et al. 2025, arXiv 2501.01423, section 3.2), `marginal_cosine` + `distance_similarity`.

    The projection is learned, a parameter of this module; features get no gradient. They are interpolated to the latent's grid.

    Args:
        options: backbone and margins; the weight is applied by the training step, which knows the adaptive ratio.
        latent_channels: channels z of the latent.

    Raises:
        ModelError, WeightsError, MissingDependencyError: the backbone can't be had; see `FrozenBackbone`.
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
        with torch.autocast(
            latent.device.type, enabled=False
        ):  # normalized vectors and margins: not for 8 bits of mantissa
            z, features = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (latent, features))
            features = F.interpolate(
                features, size=z.shape[-2:], mode="bilinear", align_corners=False, antialias=True
            )
            return marginal_cosine(
                self.projection(z), features, self.options.cosine_margin
            ) + distance_similarity(z, features, self.options.distance_margin)


def marginal_cosine(projected: Tensor, features: Tensor, margin: float) -> Tensor:
    """relu(1 - margin - cos(W z, f)) averaged over the places of each image, [B, C, h, w] x 2 -> [B]."""
    cosine = (F.normalize(projected, dim=1) * F.normalize(features, dim=1)).sum(dim=1)
    return F.relu(1.0 - margin - cosine).flatten(1).mean(dim=1)


def distance_similarity(latent: Tensor, features: Tensor, margin: float) -> Tensor:
    """relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin) averaged over all pairs of places of each image, -> [B].

    z is the latent before the projection, as the paper writes it; the authors' code takes it after. All pairs of N places are N^2
    numbers an image: above `LIMIT` in a batch they are made some rows at a time, and again in the backward pass, so that memory
    grows with N and not with its square.

    Args:
        latent: [B, z, h, w].
        features: [B, C, h, w].
        margin: difference of similarities that costs nothing.
    """
    z, f = (F.normalize(x.flatten(2), dim=1) for x in (latent, features))
    batch, places = z.shape[0], z.shape[2]
    rows = max(LIMIT // (batch * places), 1)
    if rows >= places:
        return _excess(z, z, f, f, margin) / places**2
    parts = zip(z.split(rows, dim=2), f.split(rows, dim=2), strict=True)
    sums = [checkpoint(_excess, a, z, b, f, margin, use_reentrant=False) for a, b in parts]
    return torch.stack(sums).sum(dim=0) / places**2


def _excess(some_z: Tensor, z: Tensor, some_f: Tensor, f: Tensor, margin: float) -> Tensor:
    """Sum over the pairs of some places with all of them, [B]."""
    difference = some_z.transpose(1, 2) @ z - some_f.transpose(1, 2) @ f
    return F.relu(difference.abs() - margin).sum(dim=(1, 2))

"""Matching of the spectrum of a latent to that of its image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.models.base import AutoencoderOutput

__all__ = ["dct2", "radial_log_spectrum", "spectrum", "spectrum_matching"]

_EPS = 1e-8


def spectrum(output: AutoencoderOutput, images: Tensor) -> Tensor:
    """`spectrum_matching` of the latent that is decoded and its images, [B]."""
    return spectrum_matching(output.latent, images)


def spectrum_matching(latent: Tensor, images: Tensor, *, bins: int = 16, flattening: float = 0.0) -> Tensor:
    """KL(p || q) of the normalized radial DCT log-spectra p of the image, shrunk to the latent's size, and q of the latent, -> [B].

    Source: "encoding spectrum matching" of Ning et al. 2026, arXiv 2603.14645, read from the authors' code: sum_k p_k log(p_k / q_k) over
    the bands k of `radial_log_spectrum`. Two readings are ours. The image is shrunk by antialiased bicubic interpolation, where the
    code blurs by 1.2 pixels and then interpolates bicubically, which is right for f = 4 and aliases for f = 32. And radii are in
    cycles a pixel along each side, which for square latents is the code's distance of indices. The image gets no gradient.

    Args:
        latent: [B, z, h, w]; log(1 + power) in it is not free of scale, so latents of about unit spread are meant.
        images: [B, C, H, W] in [-1, 1].
        bins: bands between the lowest and the highest frequency.
        flattening: delta; the image's power in band k = 1, 2, ... is multiplied by k^delta, which makes its power law less steep (the
            authors' ESM-AE: 1, with a weight of 0.01).
    """
    with torch.autocast(latent.device.type, enabled=False):  # powers span many orders of magnitude
        z = latent.to(torch.promote_types(latent.dtype, torch.float32))
        with torch.no_grad():
            x = F.interpolate(
                images.to(z.dtype), size=z.shape[-2:], mode="bicubic", align_corners=False, antialias=True
            )
            p = radial_log_spectrum(x, bins, flattening)
        q = radial_log_spectrum(z, bins)
        return (p * (torch.log(p + _EPS) - torch.log(q + _EPS))).sum(dim=1)


def radial_log_spectrum(x: Tensor, bins: int = 16, flattening: float = 0.0) -> Tensor:
    """Share of each band of spatial frequency in log(1 + power), [B, C, H, W] -> [B, bins]; sums to 1.

    Power is DCT(x)^2, averaged over channels and over the frequencies of a band, whose radius is sqrt(fy^2 + fx^2) with the highest
    at 1. The mean of the image has no power, but its place counts in the average, as in the authors' code. Bands that a small image
    has no frequency for are empty; where there is no power at all everything is zero.
    """
    height, width = x.shape[-2:]
    power = dct2(x).square().mean(dim=1).flatten(1)  # [B, H W]
    power = torch.cat([torch.zeros_like(power[:, :1]), power[:, 1:]], dim=1)
    membership = _bands(height, width, bins, x)
    band = power @ membership / membership.sum(dim=0).clamp_min(1.0)
    frequency = torch.arange(1, bins + 1, dtype=x.dtype, device=x.device)
    level = torch.log1p(band * frequency**flattening)
    return level / (level.sum(dim=1, keepdim=True) + _EPS)


def dct2(x: Tensor) -> Tensor:
    """Orthonormal two-dimensional DCT-II (Ahmed et al. 1974) of the last two dimensions, of any sizes, in the dtype of x."""
    return _dct_matrix(x.shape[-2], x) @ x @ _dct_matrix(x.shape[-1], x).T


def _dct_matrix(size: int, like: Tensor) -> Tensor:
    """D[k, n] = c_k sqrt(2 / N) cos(pi (2 n + 1) k / (2 N)) with c_0 = sqrt(1/2) and c_k = 1."""
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    matrix = torch.cos(math.pi / size * (n + 0.5) * n.view(-1, 1)) * math.sqrt(2.0 / size)
    matrix[0] *= math.sqrt(0.5)
    return matrix.to(like.device, like.dtype)


def _bands(height: int, width: int, bins: int, like: Tensor) -> Tensor:
    """1 where a frequency belongs to a band, [H W, bins]."""
    y = torch.arange(height, dtype=torch.float64, device="cpu") / height
    x = torch.arange(width, dtype=torch.float64, device="cpu") / width
    radius = torch.sqrt(y.view(-1, 1).square() + x.square()).flatten()
    share = radius / radius.max().clamp_min(_EPS)
    band = (share * bins + 1e-9).floor().long().clamp_max(bins - 1)  # rounding must not part equal radii
    return F.one_hot(band, bins).to(like.device, like.dtype)

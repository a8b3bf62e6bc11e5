"""Spectrum matching: pulls the latent's spatial spectrum towards the image's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.losses.reconstruction import wide
from latentae.models.base import AutoencoderOutput

__all__ = ["dct2", "radial_log_spectrum", "spectrum", "spectrum_matching"]

_EPS = 1e-8


def spectrum(output: AutoencoderOutput, images: Tensor) -> Tensor:
    """`spectrum_matching` of the latent and its images, [B]."""
    return spectrum_matching(output.latent, images)


def spectrum_matching(latent: Tensor, images: Tensor, *, bins: int = 16, flattening: float = 0.0) -> Tensor:
    """KL(p || q) of radial DCT log-spectra, p of the shrunk image, q of the latent, -> [B].

    Source: "encoding spectrum matching" (Ning et al. 2026, arXiv 2603.14645) as in the authors'
    code: sum_k p_k log(p_k / q_k) over the bands k of `radial_log_spectrum`. Two choices differ.
    The image is shrunk by antialiased bicubic interpolation; the code blurs by 1.2 pixels first,
    which fits f = 4 and aliases at f = 32. And radii are in cycles per pixel along each side; for
    square latents this equals the code's distance of indices. The image gets no gradient.

    Args:
        latent: [B, z, h, w], of about unit standard deviation: log(1 + power) depends on scale.
        images: [B, C, H, W] in [-1, 1].
        bins: bands between the lowest and the highest frequency.
        flattening: delta; the image's power in band k = 1, 2, ... is multiplied by k^delta, which
            flattens its power law (the authors' ESM-AE uses 1, with a weight of 0.01).
    """
    with torch.autocast(latent.device.type, enabled=False):  # powers span many orders of magnitude
        z, size = wide(latent), latent.shape[-2:]
        with torch.no_grad():
            images = images.to(z.dtype)
            x = F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)
            p = radial_log_spectrum(x, bins, flattening)
        q = radial_log_spectrum(z, bins)
        return (p * (torch.log(p + _EPS) - torch.log(q + _EPS))).sum(dim=1)


def radial_log_spectrum(x: Tensor, bins: int = 16, flattening: float = 0.0) -> Tensor:
    """Share of each band of spatial frequency in log(1 + power), [B, C, H, W] -> [B, bins].

    Sums to 1.

    Power is DCT(x)^2 averaged over channels and over the frequencies of a band. A frequency's
    radius is sqrt(fy^2 + fx^2), and the highest is 1. The image's mean has no power, but it counts
    in the average, as in the authors' code. Bands without a frequency in a small image are empty;
    an image without power gives zeros.
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
    """Orthonormal DCT-II (Ahmed et al. 1974) of the last two dimensions, in the dtype of x."""
    return _dct_matrix(x.shape[-2], x) @ x @ _dct_matrix(x.shape[-1], x).T


def _dct_matrix(size: int, like: Tensor) -> Tensor:
    """D[k, n] = c_k sqrt(2 / N) cos(pi (2 n + 1) k / (2 N)) with c_0 = sqrt(1/2) and c_k = 1."""
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    matrix = torch.cos(math.pi / size * (n + 0.5) * n.view(-1, 1)) * math.sqrt(2.0 / size)
    matrix[0] *= math.sqrt(0.5)
    return matrix.to(like.device, like.dtype)


def _bands(height: int, width: int, bins: int, like: Tensor) -> Tensor:
    """1 where a frequency belongs to a band, [H W, bins]."""
    y, x = (torch.arange(size, dtype=torch.float64, device="cpu") / size for size in (height, width))
    radius = torch.sqrt(y.view(-1, 1).square() + x.square()).flatten()
    share = radius / radius.max().clamp_min(_EPS)
    band = (share * bins + 1e-9).floor().long().clamp_max(bins - 1)  # rounding must not split equal radii
    return F.one_hot(band, bins).to(like.device, like.dtype)

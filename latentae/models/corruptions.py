"""Corruptions of images before the encoder and of latents before the decoder.

Images are [B, C, H, W] in [-1, 1], latents [B, z, h, w]. Random numbers are arguments, one row per
sample, so that the corruption of a sample does not depend on its batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.errors import ImageError, ModelError

__all__ = [
    "add_latent_noise",
    "add_noise",
    "blur",
    "detok_ratio",
    "fill_masked",
    "keep_channels",
    "mask_latent",
    "mix_noise",
    "nested_count",
    "patch_mask",
]


def add_noise(images: Tensor, noise: Tensor, std: Tensor) -> Tensor:
    """x + std noise, not clamped (Vincent et al. 2010, "Stacked Denoising Autoencoders").

    Args:
        images: x, [B, C, H, W].
        noise: standard normal, [B, C, H, W].
        std: standard deviation for each sample, in units of the range [-1, 1], [B].
    """
    return images + _each(std, images) * noise.to(images.dtype)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, truncated at 4 sigma, with reflected edges; a sigma of 0 changes no bit.

    Args:
        images: [B, C, H, W].
        sigma: standard deviation in pixels for each sample, [B].
    """
    sigma = sigma.to(images.device, torch.float32)
    radius = math.ceil(4.0 * float(sigma.max()))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    # each sample has its own radius, so that the batch does not change its taps
    inside = offsets.abs() <= torch.ceil(4.0 * sigma).view(-1, 1)
    taps = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3).view(-1, 1)).square()) * inside
    taps = (taps / taps.sum(dim=1, keepdim=True)).to(images.dtype)
    blurred = images.transpose(0, 1)  # one group of the convolution per sample
    for side in (-1, -2):
        pixels = _reflected(blurred.shape[side], radius, images.device)
        kernel = taps.view(-1, 1, 1, len(offsets)) if side == -1 else taps.view(-1, 1, len(offsets), 1)
        blurred = F.conv2d(blurred.index_select(side, pixels), kernel, groups=len(sigma))
    return torch.where(_each(sigma, sigma) > 0, blurred.transpose(0, 1), images)


def patch_mask(uniform: Tensor, ratio: Tensor) -> Tensor:
    """Hide the round(ratio gh gw) patches with the smallest numbers.

    He et al. 2022, "Masked Autoencoders", section 3.

    Args:
        uniform: numbers in [0, 1), one per patch, [B, gh, gw].
        ratio: share of the patches to hide for each sample, in [0, 1], [B].

    Returns:
        True for hidden patches, [B, 1, gh, gw].
    """
    numbers = uniform.flatten(1)
    hidden = torch.round(ratio.to(torch.promote_types(ratio.dtype, torch.float32)) * numbers.shape[1])
    rank = numbers.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < hidden.view(-1, 1)).view(uniform.shape).unsqueeze(1)


def fill_masked(images: Tensor, mask: Tensor, fill: Tensor) -> Tensor:
    """Replace hidden patches by a fill, which has a gradient and may be learned.

    Args:
        images: [B, C, H, W].
        mask: True for hidden patches, [B, 1, gh, gw]; the patch's value counts for all its pixels.
        fill: a color [C], or a patch [C, p, p] with p = H / gh = W / gw.

    Raises:
        ImageError: the patches of p pixels do not cover the image.
    """
    (height, width), (rows, columns) = images.shape[-2:], mask.shape[-2:]
    if fill.ndim == 1:
        fill = fill.view(-1, 1, 1)
    elif (rows * fill.shape[1], columns * fill.shape[2]) != (height, width):
        patch = f"{fill.shape[1]} x {fill.shape[2]}"
        raise ImageError(
            f"image is {height} x {width}, expected {rows} x {columns} patches of {patch}; crop or resize "
            "it, or fill with one color"
        )
    else:
        fill = fill.repeat(1, rows, columns)
    hidden = mask[:, :, _nearest(height, rows, mask.device)][..., _nearest(width, columns, mask.device)]
    return torch.where(hidden, fill.to(images.dtype), images)


def mix_noise(latent: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """z' = (1 - t) z + t noise (l-DeTok, Yang et al. 2025, eq. 2).

    Args:
        latent: z, [B, z, h, w].
        noise: normal, with the wanted standard deviation (l-DeTok: 3), [B, z, h, w].
        share: t in [0, 1] for each sample, [B].
    """
    t = _each(share, latent)
    return (1 - t) * latent + t * noise.to(latent.dtype)


def add_latent_noise(latent: Tensor, noise: Tensor, std: Tensor) -> Tensor:
    """z' = z + std noise (RAE, Zheng et al. 2025, arXiv 2510.11690: noise-augmented decoding).

    Args:
        latent: z, [B, z, h, w].
        noise: standard normal, [B, z, h, w].
        std: for each sample, [B]. With tau = 0.8, the paper draws |N(0, tau^2)| and its code U(0,
            tau).
    """
    return latent + _each(std, latent) * noise.to(latent.dtype)


def mask_latent(latent: Tensor, mask: Tensor, fill: Tensor) -> Tensor:
    """Replace latent pixels by a fill, which has a gradient and may be learned.

    l-DeTok masks tokens of a transformer's input; here the decoder gets a masked latent.

    Args:
        latent: [B, z, h, w].
        mask: True for hidden pixels, [B, 1, h, w], as from `patch_mask`.
        fill: [z].
    """
    return torch.where(mask, fill.to(latent.dtype).view(1, -1, 1, 1), latent)


def detok_ratio(uniform: Tensor, highest: float = 0.7) -> Tensor:
    """max(0, U(-0.1, highest)) from numbers in [0, 1), so that some samples are not masked.

    l-DeTok, Yang et al. 2025, arXiv 2507.15856.

    Args:
        uniform: [B].
        highest: upper end of the masked share.
    """
    return (-0.1 + (highest + 0.1) * uniform).clamp_min(0.0)


def keep_channels(latent: Tensor, count: int) -> Tensor:
    """Zero all channels from `count` on, [B, z, h, w].

    DC-AE 1.5, Chen et al. 2025, arXiv 2508.00413: structured latent space.

    Raises:
        ModelError: `count` is not from 1 to the latent's channels.
    """
    channels = latent.shape[1]
    if not 1 <= count <= channels:
        raise ModelError(f"keep_channels: count is {count}, expected 1 to {channels}, the latent's channels")
    kept = torch.arange(channels, device=latent.device) < count
    return torch.where(kept.view(1, -1, 1, 1), latent, latent.new_zeros(()))


def nested_count(uniform: float, channels: int, step: int, fewest: int | None = None) -> int:
    """One of fewest, fewest + step, ..., channels, equally likely for a uniform number in [0, 1).

    The last choice is always `channels`. DC-AE 1.5 takes 16, 20, 24, ... up to all channels, with
    one draw per training step for all processes.

    Args:
        uniform: in [0, 1).
        channels: of the latent.
        step: channels between two choices.
        fewest: the smallest choice; defaults to `step`.

    Raises:
        ModelError: step or fewest is outside [1, channels].
    """
    fewest = step if fewest is None else fewest
    if not 1 <= step <= channels or not 1 <= fewest <= channels:
        raise ModelError(
            f"nested channels: step is {step}, fewest {fewest}; expected both from 1 to {channels}, the "
            "latent's channels"
        )
    choices = [*range(fewest, channels, step), channels]
    return choices[int(uniform * len(choices))]


def _each(values: Tensor, x: Tensor) -> Tensor:
    """One number per sample, [B] -> [B, 1, 1, 1], in the dtype of x."""
    return values.view(-1, 1, 1, 1).to(x.dtype)


def _nearest(pixels: int, patches: int, device: torch.device) -> Tensor:
    return torch.arange(pixels, device=device) * patches // pixels


def _reflected(side: int, radius: int, device: torch.device) -> Tensor:
    """Pixels at -radius, ..., side - 1 + radius by reflection, without repeating the edge."""
    if side == 1:
        return torch.zeros(1 + 2 * radius, dtype=torch.long, device=device)
    period = 2 * (side - 1)
    position = torch.arange(-radius, side + radius, device=device).remainder(period)
    return torch.minimum(position, period - position)

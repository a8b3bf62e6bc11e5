"""Measures of the family page and its test: each variant by the property it is named for.

Images are float [N, C, H, W] in [-1, 1] and models in evaluation mode, small enough for one batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentae.losses.latent import frobenius_exact
from latentae.models.base import Autoencoder

__all__ = ["channel_kl", "error", "hide", "jacobian", "movement", "nearest", "sampled", "units_needed"]


@torch.no_grad()
def error(
    model: Autoencoder, given: Tensor, wanted: Tensor | None = None, where: Tensor | None = None
) -> float:
    """Mean squared error of the reconstruction against `wanted` (or `given`) within `where`."""
    squared = (model.decode(model.encode(given).mean) - (given if wanted is None else wanted)).square()
    return (squared if where is None else squared[where.expand_as(squared)]).mean().item()


def hide(images: Tensor, patch: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images with a share of their patches replaced by mid-gray, and the mask [N, 1, H, W]."""
    count, _, height, width = images.shape
    numbers = torch.rand(count, height // patch * (width // patch), generator=generator)
    hidden = numbers.argsort(dim=1).argsort(dim=1) < round(share * numbers.shape[1])
    mask = hidden.view(count, 1, height // patch, width // patch)
    mask = mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return images.masked_fill(mask, 0.0), mask


@torch.no_grad()
def units_needed(model: Autoencoder, images: Tensor, wanted: float) -> int:
    """Number of strongest units per image that reach a mean squared error of `wanted`, or all
    units.

    It does not depend on the scale of the code, which a penalty could change without effect.
    """
    code = model.encode(images).mean
    flat = code.flatten(1)
    rank = flat.abs().argsort(dim=1, descending=True).argsort(dim=1)
    for count in range(1, flat.shape[1]):
        kept = torch.where(rank < count, flat, 0.0).view_as(code)
        if (model.decode(kept) - images).square().mean().item() <= wanted:
            return count
    return flat.shape[1]


def jacobian(model: Autoencoder, images: Tensor) -> tuple[float, float]:
    """Mean of ||df/dx||_F^2, and its ratio to the code's variance."""
    with torch.no_grad():
        spread = model.encode(images).mean.flatten(1).var(dim=0).sum().item()
        energy = frobenius_exact(lambda x: model.encode(x).mean, images).mean().item()
    return energy, energy / spread


@torch.no_grad()
def movement(model: Autoencoder, images: Tensor, noise: Tensor) -> float:
    """E |f(x + noise) - f(x)|^2 over the total variance of the code."""
    code = model.encode(images).mean.flatten(1)
    moved = model.encode(images + noise).mean.flatten(1) - code
    return (moved.square().sum(dim=1).mean() / code.var(dim=0).sum()).item()


@torch.no_grad()
def channel_kl(model: Autoencoder, images: Tensor) -> Tensor:
    """Mean KL of each latent channel in nats, [z]."""
    posterior = model.encode(images)
    kl = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1 - posterior.logvar)
    return kl.sum(dim=(2, 3)).mean(dim=0)


@torch.no_grad()
def sampled(model: Autoencoder, noise: Tensor) -> Tensor:
    """Images decoded from the prior: standard normal latents [N, z, h, w]."""
    return model.decode(noise)


def nearest(images: Tensor, others: Tensor) -> float:
    """Mean over `images` of the mean squared difference to the nearest of `others`."""
    distances = torch.cdist(images.flatten(1), others.flatten(1)).min(dim=1).values
    return distances.square().mean().item() / images[0].numel()

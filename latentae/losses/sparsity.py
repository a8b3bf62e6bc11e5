"""Sparse codes: penalties under which few units of the latent are active for an image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentae.errors import RecipeError
from latentae.losses.latent import shared_value
from latentae.losses.reconstruction import wide

__all__ = ["active_fraction", "kl_sparsity", "l1", "mean_activation"]


def l1(mean: Tensor) -> Tensor:
    """Mean |mu|, [B, z, h, w] -> [B] (Olshausen & Field 1996, with S(x) = |x|)."""
    return mean.abs().flatten(1).mean(dim=1)


def mean_activation(mean: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """rho^_j: sigmoid(mu) averaged over batch and positions, [B, z, h, w] -> [z].

    Source: Ng 2011, "Sparse autoencoder", section 3.

    Args:
        mean: of the posterior.
        reduce: averages a detached tensor over processes with equal batches, as for `shared_value`.
    """
    return shared_value(torch.sigmoid(wide(mean)).mean(dim=(0, 2, 3)), reduce)


def kl_sparsity(mean_activation: Tensor, rho: float) -> Tensor:
    """sum_j rho log(rho / rho^_j) + (1 - rho) log((1 - rho) / (1 - rho^_j)), a scalar.

    Source: Ng 2011, section 3.

    Args:
        mean_activation: rho^ in [0, 1], [z].
        rho: target activation in (0, 1); 0.05 is usual.

    Raises:
        RecipeError: rho is outside (0, 1).
    """
    if not 0.0 < rho < 1.0:
        message = f"the target activation rho is {rho:g}, expected a number between 0 and 1; 0.05 is usual"
        raise RecipeError(message)
    found = mean_activation.clamp(1e-6, 1.0 - 1e-6)  # a saturated sigmoid has no gradient to lose
    return (rho * torch.log(rho / found) + (1.0 - rho) * torch.log((1.0 - rho) / (1.0 - found))).sum()


def active_fraction(activation: Tensor, threshold: float) -> Tensor:
    """Share of the latent's elements with |activation| > threshold, [B, z, h, w] -> [B].

    Without gradient.

    Args:
        activation: the posterior's mean for `l1`, its sigmoid for `kl_sparsity`.
        threshold: in the units of the activation.
    """
    return (wide(activation.detach()).abs() > threshold).flatten(1).float().mean(dim=1)

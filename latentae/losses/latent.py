"""Penalties on the latent, one value an image."""

from __future__ import annotations

from torch import Tensor

from latentae.models.posterior import DiagonalGaussian

__all__ = ["kl_per_element"]


def kl_per_element(posterior: DiagonalGaussian, images: Tensor) -> Tensor:
    """KL(q || N(0, I)) summed over each latent and divided by the number of *image* elements, [B].

    LDM adds sum-reduced pixel losses and 1e-6 times the sum-reduced KL; dividing both by the image elements keeps that ratio at
    any resolution and makes the pixel losses plain means.
    """
    return posterior.kl() / images[0].numel()

"""A basis of patches as a method: as many floats as the model's latent, not quantised."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from latentae.evaluation.methods.base import Made
from latentae.models.pca import PatchBasis

__all__ = ["Projection"]


class Projection:
    """Images through the components of their patches and back.

    Args:
        basis: with as many components as a latent has channels, of patches as large as one latent pixel.

    Attributes:
        name: in metrics.json and per_image.csv.
        label: in tables.
    """

    name: str
    label: str

    def __init__(self, basis: PatchBasis) -> None:
        self.basis = basis

    def __call__(self, images: Tensor, budgets: Sequence[int]) -> Made:
        """What is left of uint8 images [B, C, H, W]; budgets are ignored, for floats are what is counted.

        Raises:
            ImageError: other channels than those the basis was fitted on, or a side that its patches do not divide.
        """
        return Made(self.basis.reconstruct(images))

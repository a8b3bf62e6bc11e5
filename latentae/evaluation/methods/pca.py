"""PCA of f x f patches with as many components as the latent has channels: the best linear autoencoder at equal floats."""

from __future__ import annotations

from latentae.evaluation.methods.projection import Projection

__all__ = ["Pca"]


class Pca(Projection):
    """Principal components of patches, fitted on training images by `latentae.models.pca`. Any number of channels."""

    name: str = "pca"
    label: str = "PCA with as many floats"

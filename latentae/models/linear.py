"""The linear autoencoder: one strided convolution down, one transposed convolution up. Trained on squared error it finds PCA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentae.errors import ModelError
from latentae.models.base import Autoencoder
from latentae.models.config import LinearAutoencoderConfig
from latentae.models.pca import PatchPCA
from latentae.models.posterior import DiagonalGaussian

__all__ = ["LinearAutoencoder"]


class _PatchDecoder(nn.Module):
    """z -> images: each latent pixel becomes `weight`'s combination of patches, plus one constant patch.

    A bias of one number per channel would not do: PCA adds back the mean patch, and what of it lies outside the subspace no latent gives.
    """

    def __init__(self, config: LinearAutoencoderConfig) -> None:
        super().__init__()
        shape = (config.out_channels, config.patch, config.patch)
        self.weight = None if config.tied else nn.Parameter(torch.empty(config.latent_channels, *shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, z: Tensor, shared: Tensor) -> Tensor:
        """Latents [B, z, h, w], and the encoder's weight [z, C, p, p] for a decoder that has none."""
        weight = shared if self.weight is None else self.weight
        images = F.conv_transpose2d(z, weight, stride=weight.shape[-1])
        return images + self.bias.repeat(1, z.shape[2], z.shape[3])


class LinearAutoencoder(Autoencoder):
    """A linear encoder and decoder of patches with nothing between them: deterministic, the log-variance fixed at -30.

    Trained on squared error, its decoder comes to span the leading principal components and has PCA's error, tied or untied (Baldi &
    Hornik 1989, "Neural networks and principal component analysis: learning from examples without local minima"). Orthonormality is not
    imposed: components come mixed by any invertible matrix (untied) or rotation (tied).
    """

    config: LinearAutoencoderConfig
    encoder: nn.Conv2d
    decoder: _PatchDecoder

    def __init__(self, config: LinearAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Conv2d(
            config.in_channels, config.latent_channels, config.patch, stride=config.patch
        )
        self.decoder = _PatchDecoder(config)
        self._start_as_projection()

    @torch.no_grad()
    def load_pca(self, pca: PatchPCA) -> None:
        """Become PCA: the latent is the patch's components on the [-1, 1] scale of images, their mean zero.

        Raises:
            ModelError: patch, channels or the number of components differ.
        """
        config = self.config
        numbers, components = pca.basis.shape
        found, expected = (
            (pca.patch, numbers, components),
            (config.patch, self._numbers(), config.latent_channels),
        )
        if found != expected or config.in_channels != config.out_channels:
            raise ModelError(
                f"PCA has {components} components of {pca.patch} x {pca.patch} patches with {numbers} numbers, the linear autoencoder "
                f"{config.latent_channels} of {config.patch} x {config.patch} with {self._numbers()} out of {config.in_channels} channels "
                "in; fit PCA on the same patch, channels and components"
            )
        mean = pca.mean / 127.5 - 1
        weight = pca.basis.T.reshape(self.encoder.weight.shape)
        assert self.encoder.bias is not None
        self.encoder.weight.copy_(weight)
        self.encoder.bias.copy_(-(pca.basis.T @ mean))
        self.decoder.bias.copy_(mean.reshape(self.decoder.bias.shape))
        if self.decoder.weight is not None:
            self.decoder.weight.copy_(weight)

    @torch.no_grad()
    def subspace(self) -> Tensor:
        """An orthonormal basis of what the decoder can draw around its constant patch: fp64 [d, z], d = C * patch * patch."""
        weight = self.encoder.weight if self.decoder.weight is None else self.decoder.weight
        return torch.linalg.qr(weight.double().flatten(1).T)[0]

    def _numbers(self) -> int:
        return self.config.out_channels * self.config.patch**2

    @torch.no_grad()
    def _start_as_projection(self) -> None:
        """Begin as the projection onto a random subspace, where that is possible: the decoder undoes what the encoder does."""
        assert self.encoder.bias is not None
        nn.init.orthogonal_(self.encoder.weight)
        nn.init.zeros_(self.encoder.bias)
        if self.decoder.weight is not None:
            if self.decoder.weight.shape == self.encoder.weight.shape:
                self.decoder.weight.copy_(self.encoder.weight)
            else:
                nn.init.orthogonal_(self.decoder.weight)

    def _encode(self, x: Tensor, keep_features: bool) -> tuple[DiagonalGaussian, Tensor | None]:
        return DiagonalGaussian.of_mean(self.encoder(x)), None

    def _decode(self, z: Tensor, keep_features: bool) -> tuple[Tensor, Tensor | None]:
        return self.decoder(z, self.encoder.weight), None

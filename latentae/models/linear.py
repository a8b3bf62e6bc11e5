"""The linear autoencoder: a strided convolution down, a transposed one up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentae.errors import ModelError
from latentae.models.base import Autoencoder, DiagonalGaussian
from latentae.models.config import LinearAutoencoderConfig
from latentae.models.pca import PatchPCA

__all__ = ["LinearAutoencoder"]


class _PatchDecoder(nn.Module):
    """Latent -> image: each latent pixel becomes a combination of patches plus a constant patch.

    One bias per channel is not enough: PCA adds the mean patch, and no latent gives its part
    outside the subspace.
    """

    def __init__(self, config: LinearAutoencoderConfig) -> None:
        super().__init__()
        shape = (config.out_channels, config.patch, config.patch)
        self.weight = None if config.tied else nn.Parameter(torch.empty(config.latent_channels, *shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, z: Tensor, shared: Tensor) -> Tensor:
        """Latents [B, z, h, w], and the encoder's weight [z, C, p, p] for a tied decoder."""
        weight = shared if self.weight is None else self.weight
        images = F.conv_transpose2d(z, weight, stride=weight.shape[-1])
        return images + self.bias.repeat(1, z.shape[2], z.shape[3])


class LinearAutoencoder(Autoencoder):
    """A linear encoder and decoder of patches: deterministic, with a log-variance of -30.

    Trained on squared error, its decoder spans the leading principal components and has PCA's
    error, tied or untied (Baldi & Hornik 1989, "Neural networks and principal component analysis:
    learning from examples without local minima"). Orthonormality is not imposed: components are
    mixed by any invertible matrix (untied) or rotation (tied).
    """

    config: LinearAutoencoderConfig
    encoder: nn.Conv2d
    decoder: _PatchDecoder

    def __init__(self, config: LinearAutoencoderConfig) -> None:
        super().__init__()
        z, patch = config.latent_channels, config.patch
        self.config = config
        self.encoder = nn.Conv2d(config.in_channels, z, patch, stride=patch)
        self.decoder = _PatchDecoder(config)
        self._start_as_projection()

    @torch.no_grad()
    def load_pca(self, pca: PatchPCA) -> None:
        """Become PCA: the latent is the patch's components on the [-1, 1] scale, with mean zero.

        Raises:
            ModelError: patch, channels or the number of components differ.
        """
        config = self.config
        numbers, components = pca.basis.shape
        expected = (config.patch, config.out_channels * config.patch**2, config.latent_channels)
        if (pca.patch, numbers, components) != expected or config.in_channels != config.out_channels:
            raise ModelError(
                f"PCA has {components} components of {pca.patch} x {pca.patch} patches with {numbers} "
                "numbers, the linear "
                f"autoencoder {expected[2]} of {config.patch} x {config.patch} with {expected[1]} out of "
                f"{config.in_channels} channels in; fit PCA on the same patch, channels and components"
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
        """Orthonormal basis of the decoder's patches: fp64 [d, z], d = C * patch * patch."""
        weight = self.encoder.weight if self.decoder.weight is None else self.decoder.weight
        return torch.linalg.qr(weight.double().flatten(1).T)[0]

    @torch.no_grad()
    def _start_as_projection(self) -> None:
        """Start as the projection onto a random subspace if in and out channels are equal."""
        assert self.encoder.bias is not None
        nn.init.orthogonal_(self.encoder.weight)
        nn.init.zeros_(self.encoder.bias)
        if self.decoder.weight is None:
            return
        if self.decoder.weight.shape == self.encoder.weight.shape:
            self.decoder.weight.copy_(self.encoder.weight)
        else:
            nn.init.orthogonal_(self.decoder.weight)

    def _encode(self, x: Tensor, keep_features: bool) -> tuple[DiagonalGaussian, Tensor | None]:
        return DiagonalGaussian.of_mean(self.encoder(x)), None

    def _decode(self, z: Tensor, keep_features: bool) -> tuple[Tensor, Tensor | None]:
        return self.decoder(z, self.encoder.weight), None

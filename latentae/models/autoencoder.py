"""The convolutional KL autoencoder: image -> encoder -> diagonal Gaussian -> decoder -> reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentae.models.base import Autoencoder
from latentae.models.coders import Decoder, Encoder
from latentae.models.config import AutoencoderKLConfig
from latentae.models.posterior import DiagonalGaussian

__all__ = ["AutoencoderKL"]


class AutoencoderKL(Autoencoder):
    """The autoencoder of latent diffusion (Rombach et al. 2022), with exactly diffusers' state-dict keys."""

    config: AutoencoderKLConfig
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        z = config.latent_channels
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(z, z, 1) if config.use_post_quant_conv else None
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # the fast order, on CPUs and GPUs alike

    def _encode(self, x: Tensor, keep_features: bool) -> tuple[DiagonalGaussian, Tensor | None]:
        self._check_image(x)
        moments, features = self._run(self.encoder, x, keep_features)
        return DiagonalGaussian(moments if self.quant_conv is None else self.quant_conv(moments)), features

    def _decode(self, z: Tensor, keep_features: bool) -> tuple[Tensor, Tensor | None]:
        self._check_latent(z)
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self._run(self.decoder, z, keep_features)

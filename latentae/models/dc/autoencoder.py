"""The deep-compression autoencoder, with exactly diffusers' state-dict keys and outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from latentae.models.base import Autoencoder
from latentae.models.dc.coders import DCDecoder, DCEncoder
from latentae.models.dc.config import AutoencoderDCConfig
from latentae.models.posterior import DiagonalGaussian

__all__ = ["AutoencoderDC"]

LOGVAR = -30.0  # the smallest a posterior has: a standard deviation of 3e-7
HEAD = "encoder.conv_out_logvar."


class AutoencoderDC(Autoencoder):
    """diffusers' AutoencoderDC (Chen et al. 2024, "Deep Compression Autoencoder", DC-AE), for training too.

    Space is moved to channels and back in steps of two, each beside a shortcut without parameters that averages or repeats channels, so
    that a network of many levels still trains. The published models are deterministic: the latent is what the encoder gives. With
    `bottleneck = "gaussian"` a second head, beside diffusers' layers, predicts a log-variance, so that a posterior can be trained; its
    mean is what `without_posterior`, and with it an export, keeps.
    """

    config: AutoencoderDCConfig
    encoder: DCEncoder
    decoder: DCDecoder

    def __init__(self, config: AutoencoderDCConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = DCEncoder(config)
        self.decoder = DCDecoder(config)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def without_posterior(self) -> AutoencoderDC:
        """The deterministic model whose latent is the mean, sharing the weights; itself where there is no posterior."""
        if self.config.bottleneck == "deterministic":
            return self
        with torch.device("meta"):
            plain = AutoencoderDC(self.config.model_copy(update={"bottleneck": "deterministic"}))
        state = {
            name: value
            for name, value in self.state_dict(keep_vars=True).items()
            if not name.startswith(HEAD)
        }
        plain.load_state_dict(state, assign=True)
        return plain.train(self.training)

    def with_own_head(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of a model of this family for this one: without the posterior's head, or with the one that this model has.

        So a published model, which has none, can begin a training with a posterior.
        """
        if self.config.bottleneck == "deterministic":
            return {name: value for name, value in state.items() if not name.startswith(HEAD)}
        own = {name: value for name, value in self.state_dict().items() if name.startswith(HEAD)}
        return {**own, **state}

    def _encode(self, x: Tensor, keep_features: bool) -> tuple[DiagonalGaussian, Tensor | None]:
        self._check_image(x)
        moments, features = self._run(self.encoder, x, keep_features)
        if self.config.bottleneck == "deterministic":
            moments = torch.cat([moments, torch.full_like(moments, LOGVAR)], dim=1)
        return DiagonalGaussian(moments), features

    def _decode(self, z: Tensor, keep_features: bool) -> tuple[Tensor, Tensor | None]:
        self._check_latent(z)
        return self._run(self.decoder, z, keep_features)

"""The convolutional KL autoencoder: image -> encoder -> diagonal Gaussian -> decoder -> reconstruction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from latentae.errors import ImageError, ModelError
from latentae.models.coders import Decoder, Encoder
from latentae.models.config import AutoencoderKLConfig
from latentae.models.posterior import DiagonalGaussian

__all__ = ["AutoencoderKL", "AutoencoderOutput"]


@dataclass(frozen=True)
class AutoencoderOutput:
    """What one pass gives: `reconstruction` [B, C, H, W] in about [-1, 1], `posterior`, and the `latent` [B, z, h, w] decoded."""

    reconstruction: Tensor
    posterior: DiagonalGaussian
    latent: Tensor


class AutoencoderKL(nn.Module):
    """The autoencoder of latent diffusion (Rombach et al. 2022), with exactly diffusers' state-dict keys.

    Images are float in [-1, 1], [B, C, H, W], with H and W multiples of `config.downsampling`. Latents are raw: scaling
    belongs to the pipeline that uses them.
    """

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        z = config.latent_channels
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(z, z, 1) if config.use_post_quant_conv else None
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # the fast order, on CPUs and GPUs alike

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Images [B, C, H, W] in [-1, 1] -> posterior over latents [B, z, H/f, W/f].

        Raises:
            ImageError: wrong number of channels, or a side that f does not divide.
        """
        self._check_image(x)
        moments = self.encoder(x)
        return DiagonalGaussian(moments if self.quant_conv is None else self.quant_conv(moments))

    def decode(self, z: Tensor) -> Tensor:
        """Raw latents [B, z, h, w] -> images [B, C, f*h, f*w], about [-1, 1] (not clamped).

        Raises:
            ModelError: wrong number of latent channels.
        """
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise ModelError(f"latent has shape {tuple(z.shape)}, expected [B, {self.config.latent_channels}, h, w]")
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def forward(self, x: Tensor, noise: Tensor | None = None, sample_posterior: bool = True) -> AutoencoderOutput:
        """Encode, sample (the mean when not `sample_posterior`) and decode.

        Args:
            x: images [B, C, H, W] in [-1, 1].
            noise: standard normal [B, z, H/f, W/f] for the sample; drawn from torch's generator when not given.
            sample_posterior: whether to sample or take the mean.
        """
        posterior = self.encode(x)
        latent = posterior.sample(noise=noise) if sample_posterior else posterior.mode()
        return AutoencoderOutput(self.decode(latent.to(x.dtype)), posterior, latent)

    def _check_image(self, x: Tensor) -> None:
        f, channels = self.config.downsampling, self.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ImageError(f"images have shape {tuple(x.shape)}, expected [B, {channels}, H, W]")
        height, width = x.shape[2:]
        if height % f or width % f or not height or not width:
            raise ImageError(
                f"image is {height} x {width}, expected sides that are multiples of {f}; crop, pad or resize it first"
            )

    @classmethod
    def from_pretrained(cls, path: str | Path, weights: str = "ema") -> AutoencoderKL:
        """Load a diffusers folder, a run, a checkpoint, or a safetensors file with its config.json beside it.

        Args:
            path: folder or file.
            weights: "ema" or "raw"; only runs and checkpoints hold both.

        Raises:
            ModelError: none of these, or weights that do not fit the config.
        """
        from latentae.models.pretrained import load_model

        return load_model(path, weights)[0]

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and `diffusion_pytorch_model.safetensors`, which diffusers' AutoencoderKL loads as they are."""
        from latentae.models.pretrained import save_model

        save_model(self, folder, dtype)

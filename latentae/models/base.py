"""What every autoencoder is: image -> encoder -> diagonal Gaussian -> [latent transform] -> decoder -> reconstruction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from latentae.errors import ImageError, ModelError
from latentae.models.posterior import DiagonalGaussian

__all__ = ["Autoencoder", "AutoencoderOutput"]


@dataclass(frozen=True)
class AutoencoderOutput:
    """What one pass gives."""

    reconstruction: Tensor
    """[B, C, H, W] in about [-1, 1]."""
    posterior: DiagonalGaussian
    latent: Tensor
    """[B, z, h, w], a sample of the posterior or its mean; with the encoder's graph."""
    decoded: Tensor
    """[B, z, h, w], what the decoder was given."""
    leaf: Tensor | None = None
    """Where the decoder's graph ends if `cut_latent`: the decoder's backward pass leaves its gradient here, and
    `latent.backward(leaf.grad)` goes on through the encoder. None where nothing in front of the latent learns."""
    decoder_features: Tensor | None = None
    """Input of the decoder's last normalization, detached, if `keep_features`; for `last_layer.decoder_weight_gradient`."""
    encoder_features: Tensor | None = None
    """The same of the encoder, for `last_layer.encoder_weight_gradient`."""
    also: Tensor | None = None
    """What the decoder makes of `also_decode(latent)`."""


class Autoencoder(nn.Module, ABC):
    """An encoder, a Gaussian bottleneck and a decoder.

    Images are float in [-1, 1], [B, C, H, W], with H and W multiples of `config.downsampling`. Latents are raw: scaling
    belongs to the pipeline that uses them.

    Attributes:
        config: the shape.
        gradient_checkpointing: whether training keeps the input of each block only and recomputes the rest. Outputs and gradients
            stay the same. Models without blocks take no notice.
    """

    config: Any
    encoder: Any
    decoder: Any

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Images [B, C, H, W] in [-1, 1] -> posterior over latents [B, z, H/f, W/f].

        Raises:
            ImageError: wrong number of channels, or a side that f does not divide.
        """
        return self._encode(x, False)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Raw latents [B, z, h, w] -> images [B, C, f*h, f*w], about [-1, 1] (not clamped).

        Raises:
            ModelError: wrong number of latent channels.
        """
        return self._decode(z, False)[0]

    def forward(
        self,
        x: Tensor,
        noise: Tensor | None = None,
        sample_posterior: bool = True,
        *,
        latent_transform: Callable[[Tensor], Tensor] | None = None,
        also_decode: Callable[[Tensor], Tensor] | None = None,
        cut_latent: bool = False,
        keep_features: bool = False,
    ) -> AutoencoderOutput:
        """Encode, sample (the mean when not `sample_posterior`) and decode.

        Args:
            x: images [B, C, H, W] in [-1, 1].
            noise: standard normal [B, z, H/f, W/f] for the sample; drawn from torch's generator when not given.
            sample_posterior: whether to sample or take the mean.
            latent_transform: [B, z, h, w] -> [B, z, h', w'], what is done to a latent before it is decoded (noise, a mask, a rotation).
            also_decode: [B, z, h, w] -> [B, z, h', w']: decode this of the latent, too, within the same pass.
            cut_latent: end the decoder's graph at a leaf, so that the gradient at the latent can be looked at, and changed, on its way.
            keep_features: also return what the last normalizations read.
        """
        posterior, encoder_features = self._encode(x, keep_features)
        latent = posterior.sample(noise=noise) if sample_posterior else posterior.mode()
        leaf = latent.detach().requires_grad_() if cut_latent and latent.requires_grad else None
        given = latent if leaf is None else leaf
        decoded = (given if latent_transform is None else latent_transform(given)).to(x.dtype)
        reconstruction, decoder_features = self._decode(decoded, keep_features)
        also = None if also_decode is None else self._decode(also_decode(given).to(x.dtype), False)[0]
        return AutoencoderOutput(
            reconstruction, posterior, latent, decoded, leaf, decoder_features, encoder_features, also
        )

    def compile_coders(self, **options: Any) -> None:
        """`torch.compile` encoder and decoder in place, each for itself; state-dict keys stay as they are.

        One graph for both could not be differentiated in two pieces, as `cut_latent` needs. Second derivatives (R1 on the
        reconstruction, Jacobian penalties) are beyond `torch.compile`: models that need them stay as they are.

        Args:
            **options: of `torch.compile`.
        """
        self.encoder.compile(**options)
        self.decoder.compile(**options)

    def _run(self, coder: nn.Module, x: Tensor, keep_features: bool) -> tuple[Tensor, Tensor | None]:
        """Output of the encoder or decoder, and the input of its last normalization, detached, if `keep_features`.

        A coder that a user has replaced or hooked sees a tensor only, where nothing more is wanted.
        """
        if not keep_features and not self.gradient_checkpointing:
            return coder(x), None
        out = coder(x, keep_features=keep_features, checkpointing=self.gradient_checkpointing)
        return out if keep_features else (out, None)

    @abstractmethod
    def _encode(self, x: Tensor, keep_features: bool) -> tuple[DiagonalGaussian, Tensor | None]:
        """The posterior, and what the encoder's last normalization read, detached, if `keep_features` and there is one."""

    @abstractmethod
    def _decode(self, z: Tensor, keep_features: bool) -> tuple[Tensor, Tensor | None]:
        """The images, and what the decoder's last normalization read."""

    def _check_image(self, x: Tensor) -> None:
        f, channels = self.config.downsampling, self.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ImageError(f"images have shape {tuple(x.shape)}, expected [B, {channels}, H, W]")
        height, width = x.shape[2:]
        if height % f or width % f or not height or not width:
            raise ImageError(
                f"image is {height} x {width}, expected sides that are multiples of {f}; crop, pad or resize it first"
            )

    def _check_latent(self, z: Tensor) -> None:
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise ModelError(
                f"latent has shape {tuple(z.shape)}, expected [B, {self.config.latent_channels}, h, w]"
            )

    @classmethod
    def from_pretrained(cls, path: str | Path, weights: str = "ema") -> Self:
        """Load a diffusers folder, a run, a checkpoint, a repository on the Hub, or a file of weights.

        Args:
            path: folder, file or `owner/name`.
            weights: "ema" or "raw"; only runs and checkpoints hold both.

        Raises:
            ModelError: none of these, weights that do not fit the config, or a model of another class.
        """
        from latentae.models.pretrained import load_model

        model = load_model(path, weights)[0]
        if not isinstance(model, cls):
            raise ModelError(f"{path} is a {type(model).__name__}, not a {cls.__name__}; load it as one")
        return model

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and `diffusion_pytorch_model.safetensors`, which diffusers loads as they are where it has the class."""
        from latentae.models.pretrained import save_model

        save_model(self, folder, dtype)

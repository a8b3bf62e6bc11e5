"""A deep-compression autoencoder whose step 0 is PCA: a trunk that carries patches, and branches that add nothing yet.

The idea of starting an autoencoder at PCA is that of arXiv 2311.10699, which has it for small fully connected ones; the construction is
ours (docs/decisions/0017). `encoder_start` and `decoder_start` are its two halves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentae.errors import ModelError
from latentae.models.config import AutoencoderDCConfig
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.dc.decoder_start import narrowest, start_decoder
from latentae.models.dc.encoder_start import start_encoder
from latentae.models.dc.patches import PatchSample
from latentae.models.initialization import start_linear
from latentae.models.pca import PatchBasis

__all__ = ["check_head_start", "start_at_pca"]

ODD = ("relu", "silu", "swish", "gelu")  # x * s(x) with s(x) + s(-x) = 1, so that act(x) - act(-x) = x
SMALLEST_SPREAD = 0.01
"""A component that hardly varies is not blown up further than from this standard deviation, on the [0, 255] scale."""


def check_head_start(config: AutoencoderDCConfig) -> None:
    """Whether a model of this shape can start at PCA.

    Raises:
        ModelError: its decoder doubles by 'interpolate', ends in an activation by which no pair of channels passes a number, or is too
            narrow there.
    """
    if config.upsample_block_type == "interpolate":
        raise ModelError(
            "upsample_block_type is 'interpolate', which gives four pixels the same mean whatever the weights: a start at PCA needs "
            "'pixel_shuffle'"
        )
    if config.decoder_conv_act_fn.lower() not in ODD:
        raise ModelError(
            f"decoder_conv_act_fn is {config.decoder_conv_act_fn!r}, by which no pair of channels passes a number exactly: a start at "
            f"PCA needs one of {', '.join(ODD)}"
        )
    finest = 0 if config.decoder_layers_per_block[0] else 1
    width, needed = config.decoder_block_out_channels[finest], narrowest(config.in_channels, 2**finest)
    if width < needed:
        raise ModelError(
            f"the decoder's finest level has {width} channels, but a start at PCA carries {needed // 2} numbers in pairs and one "
            f"constant there; give it {needed} or more"
        )


@torch.no_grad()
def start_at_pca(
    model: AutoencoderDC, pca: PatchBasis, images: Tensor | Sequence[Tensor], *, whiten: bool = True
) -> None:
    """Set the weights so that latents are the principal components of f x f patches, and decoding them is PCA's reconstruction.

    All weights of the trunk are replaced; residual branches keep random weights and end in a normalization that gives zero. A posterior's
    log-variance starts at 0. Where a level has too few channels for its patch, the encoder keeps what predicts the components best and the
    decoder what the components vary most in.

    Args:
        model: on any device, in any floating-point type; the weights are computed in fp64 and rounded.
        pca: components of patches of `config.downsampling` pixels; as many as `config.latent_channels`.
        images: uint8 [N, C, H, W], or such batches, `pca` was fitted on. Spreads are measured on them.
        whiten: divide the components by their standard deviation, so that every latent channel has variance one.

    Raises:
        ModelError: `pca` is of another shape, or the model can't start at PCA (`check_head_start`).
        ImageError: sides of `images` that the patch does not divide.
    """
    check_head_start(model.config)
    _check_shape(model, pca)
    start_linear(model)
    sample = PatchSample([images] if isinstance(images, Tensor) else images)
    shape = (pca.channels, pca.patch, pca.patch)
    basis = pca.basis.double().T.reshape(-1, *shape)
    spread = (
        pca.variances.double().sqrt().clamp(min=SMALLEST_SPREAD) / 127.5
        if whiten
        else torch.ones(len(basis)).double()
    )
    offset = (pca.mean.double() / 127.5 - 1).reshape(shape) - sample.colour[:, None, None]
    wanted = basis / spread[:, None, None, None]
    latent = start_encoder(model.encoder, wanted, spread, offset, sample)
    drawn = basis * spread[:, None, None, None] if latent is wanted else sample.prediction(latent)
    start_decoder(model.decoder, drawn, offset, sample)


def _check_shape(model: AutoencoderDC, pca: PatchBasis) -> None:
    config = model.config
    found = (pca.components, pca.patch, pca.channels)
    if found != (config.latent_channels, config.downsampling, config.in_channels):
        raise ModelError(
            f"PCA has {found[0]} components of patches of {found[1]} pixels with {found[2]} channels, the autoencoder "
            f"{config.latent_channels} latent channels, f{config.downsampling} and {config.in_channels} image channels; fit PCA for it"
        )

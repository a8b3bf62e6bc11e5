"""Gradients at a last layer's weight for any gradient at its output, from the layer's stored input.

Adaptive weights compare losses by the norm of their gradients at the last layer: of the decoder
(Esser et al. 2021, "Taming Transformers", eq. 7), or of the encoder (Yao & Wang 2025,
"Reconstruction vs. Generation", "adaptive weighting"). Other code retains the graph for one
backward pass per loss. The weight gradient of a convolution needs only its input and the gradient
at its output, so no backward pass is needed here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from latentae.errors import ModelError
from latentae.models.autoencoder import AutoencoderKL, Coder
from latentae.models.base import Autoencoder
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.pending import normalize_activate
from latentae.models.posterior import DiagonalGaussian

__all__ = ["decoder_weight_gradient", "encoder_weight_gradient"]


@torch.no_grad()
def decoder_weight_gradient(model: Autoencoder, features: Tensor, gradient: Tensor) -> Tensor:
    """d sum(gradient * reconstruction) / d weight of the decoder's last convolution, fp32 or wider.

    Args:
        model: the autoencoder, with the weights of the forward pass.
        features: `AutoencoderOutput.decoder_features`.
        gradient: [B, C, H, W]. Several stacked over channels, [B, n C, H, W], share the work and
            give [n C, ...].

    Returns:
        [C, C_in, 3, 3]; [4 C, C_in, 3, 3] if a pixel shuffle follows the last convolution.

    Raises:
        ModelError: a model without such a layer.
    """
    with torch.autocast(features.device.type, enabled=False):
        if isinstance(model, AutoencoderDC):
            return model.decoder.weight_gradient(features, gradient)
        decoder = _kl(model).decoder
        activation = _activation(decoder, features)
        shape = [gradient.shape[1], *decoder.conv_out.weight.shape[1:]]
        return conv2d_weight(activation, shape, gradient.to(activation.dtype), padding=1)


def encoder_weight_gradient(
    model: Autoencoder, features: Tensor, noise: Tensor | None, gradient: Tensor
) -> Tensor:
    """d sum(gradient * latent) / d weight of the encoder's last convolution, in at least fp32.

    The layers from it to the sample run again, which costs little at the latent's resolution.

    Args:
        model: the autoencoder, with the weights of the forward pass.
        features: `AutoencoderOutput.encoder_features`.
        noise: the posterior sample's noise, [B, z, h, w]; None if the mean was decoded.
        gradient: [B, z, h, w].

    Returns:
        [2z, C_in, 3, 3], the weight of mean and log-variance; [z, C_in, 3, 3], that of the mean,
        for an AutoencoderDC.

    Raises:
        ModelError: a model without such a layer.
    """
    if isinstance(model, AutoencoderDC):
        with torch.autocast(features.device.type, enabled=False):
            return model.encoder.weight_gradient(features, gradient)
    conv, quant = _kl(model).encoder.conv_out, _kl(model).quant_conv
    activation = _activation(_kl(model).encoder, features)
    wide = activation.dtype
    assert conv.bias is not None
    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        weight = conv.weight.detach().to(wide).requires_grad_()
        moments = F.conv2d(activation, weight, conv.bias.detach().to(wide), padding=1)
        if quant is not None:
            assert quant.bias is not None
            moments = F.conv2d(moments, quant.weight.detach().to(wide), quant.bias.detach().to(wide))
        posterior = DiagonalGaussian(moments)
        latent = posterior.mode() if noise is None else posterior.sample(noise=noise.to(wide))
        return torch.autograd.grad(latent, weight, gradient.to(wide))[0]


def _kl(model: Autoencoder) -> AutoencoderKL:
    if not isinstance(model, AutoencoderKL):
        raise ModelError(
            f"a {type(model).__name__} has no last layer to weigh losses at; set adaptive = false"
        )
    return model


@torch.no_grad()
def _activation(coder: Coder, features: Tensor) -> Tensor:
    """The last convolution's input."""
    with torch.autocast(features.device.type, enabled=False):
        y = normalize_activate(coder.conv_norm_out, features)
    return y.to(torch.promote_types(y.dtype, torch.float32))

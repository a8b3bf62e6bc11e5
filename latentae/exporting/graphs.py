"""Encoder and decoder as programs of standard operators, for ONNX and AOTInductor."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from latentae.exporting.diffusers_folder import Exportable
from latentae.measures.latents.half import DECODER, ENCODER
from latentae.models.dc.autoencoder import AutoencoderDC

__all__ = ["TOLERANCE", "coder_graphs", "largest_difference"]

TOLERANCE = 1e-4  # allowed by `largest_difference`


def coder_graphs(model: Exportable, device: str | torch.device = "cpu") -> dict[str, nn.Module]:
    """Encoder and decoder of a copy of `model`, in fp32, with one tensor in and one out.

    The encoder maps images [B, C, H, W] in [-1, 1] to the posterior's moments [B, 2z, H/f, W/f]:
    mean and log-variance, before any clamp. An AutoencoderDC's gives the latent or posterior mean
    [B, z, H/f, W/f]. The decoder maps raw latents [B, z, h, w] to images [B, C, f*h, f*w].
    """
    plain = copy.deepcopy(model).to(device, torch.float32).eval().requires_grad_(False)
    if isinstance(plain, AutoencoderDC):
        plain = plain.without_posterior()
        return {ENCODER: _chain(encoder=plain.encoder), DECODER: _chain(decoder=plain.decoder)}
    return {
        ENCODER: _chain(encoder=plain.encoder, quant_conv=plain.quant_conv),
        DECODER: _chain(post_quant_conv=plain.post_quant_conv, decoder=plain.decoder),
    }


def _chain(**modules: nn.Module | None) -> nn.Module:
    return nn.Sequential(OrderedDict({name: part for name, part in modules.items() if part is not None}))


def largest_difference(
    model: Exportable,
    name: str,
    graph: nn.Module,
    other: Callable[[Tensor], Tensor],
    device: str | torch.device = "cpu",
) -> float:
    """Largest difference of `other` to a graph of `coder_graphs(model)`, at two sizes not traced.

    Inputs are random. The difference is relative to the largest value where that is above 1, since
    moments of an untrained model can be large. NaN if either output has one.
    """
    z, channels, f = model.config.latent_channels, model.config.in_channels, model.config.downsampling
    generator = torch.Generator().manual_seed(0)
    worst = torch.zeros(())
    for batch, height, width in ((1, 5, 2), (3, 2, 4)):
        shape = (batch, channels, f * height, f * width) if name == ENCODER else (batch, z, height, width)
        x = torch.randn(shape, generator=generator).to(device)
        with torch.no_grad():
            expected, found = graph(x), other(x)
        error = (found - expected).abs().amax() / expected.abs().amax().clamp(min=1)
        worst = torch.maximum(worst, error.cpu())
    return worst.item()

"""Encoder and decoder as programs of standard operators, for ONNX and AOTInductor."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from latentae.exporting.diffusers_folder import Exportable
from latentae.models.dc.autoencoder import AutoencoderDC

__all__ = ["DECODER", "ENCODER", "TOLERANCE", "coder_graphs", "coder_programs", "largest_difference"]

ENCODER, DECODER = "encoder", "decoder"
SMALLEST = 2  # latent pixels per side; size 1 would give attention's tokens other symbolic strides
TOLERANCE = 1e-4  # allowed by `largest_difference`


def coder_graphs(model: Exportable, device: str | torch.device = "cpu") -> dict[str, nn.Module]:
    """Encoder and decoder of a copy of `model`, in fp32 on `device`, with one tensor in and one out.

    The encoder maps images [B, C, H, W] in [-1, 1] to the posterior's moments [B, 2z, H/f, W/f]: mean
    and log-variance, before any clamp. An AutoencoderDC's gives the latent or posterior mean
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


def coder_programs(model: Exportable, graphs: dict[str, nn.Module]) -> dict[str, ExportedProgram]:
    """`torch.export` of `coder_graphs(model)` with dynamic batch, height and width.

    The batch is 1 or more. Image sides are multiples of f, latents have SMALLEST pixels or more per
    side.
    """
    z, channels, f = model.config.latent_channels, model.config.in_channels, model.config.downsampling
    device = next(graphs[ENCODER].parameters()).device
    # torch.export takes a size of 1 for a constant, and equal sizes for one number
    images = torch.zeros(2, channels, 3 * f, 4 * f, device=device)
    latents = torch.zeros(2, z, 3, 4, device=device)
    batch = Dim("batch_size", min=1)
    height, width = Dim("latent_height", min=SMALLEST), Dim("latent_width", min=SMALLEST)
    examples = {
        ENCODER: (images, {0: batch, 2: f * height, 3: f * width}),
        DECODER: (latents, {0: batch, 2: height, 3: width}),
    }
    with torch.no_grad():
        return {
            name: torch.export.export(graphs[name], (example,), dynamic_shapes=(shape,))
            for name, (example, shape) in examples.items()
        }


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

"""Encoder and decoder as graphs of standard operators: what ONNX and AOTInductor start from."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from latentae.exporting.kinds import Exportable
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.dc.autoencoder import AutoencoderDC

__all__ = ["DECODER", "ENCODER", "coder_graphs", "coder_programs", "largest_difference"]

ENCODER, DECODER = "encoder", "decoder"
SMALLEST = (
    2  # latent pixels a side; with one the symbolic strides of attention's tokens would have to be told apart
)


class EncoderGraph(nn.Module):
    """Images -> moments of the posterior, before they are clamped or sampled."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.encoder, self.quant_conv = model.encoder, model.quant_conv

    def forward(self, sample: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> [B, 2z, H/f, W/f], mean and log-variance stacked."""
        moments = self.encoder(sample)
        return moments if self.quant_conv is None else self.quant_conv(moments)


class DecoderGraph(nn.Module):
    """Raw latents -> images."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = model.decoder, model.post_quant_conv

    def forward(self, latent_sample: Tensor) -> Tensor:
        """[B, z, h, w] -> [B, C, f*h, f*w], about [-1, 1]."""
        z = latent_sample if self.post_quant_conv is None else self.post_quant_conv(latent_sample)
        return self.decoder(z)


class DCEncoderGraph(nn.Module):
    """Images -> latents, of an AutoencoderDC."""

    def __init__(self, model: AutoencoderDC) -> None:
        super().__init__()
        self.encoder = model.encoder

    def forward(self, sample: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> [B, z, H/f, W/f]."""
        return self.encoder(sample)


class DCDecoderGraph(nn.Module):
    """Raw latents -> images, of an AutoencoderDC."""

    def __init__(self, model: AutoencoderDC) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        """[B, z, h, w] -> [B, C, f*h, f*w], about [-1, 1]."""
        return self.decoder(latent_sample)


def coder_graphs(model: Exportable, device: str | torch.device = "cpu") -> dict[str, nn.Module]:
    """Encoder and decoder of a copy of `model`, in fp32 on `device`, as modules of one tensor in and one out.

    Of an AutoencoderKL the encoder gives the posterior's moments, of an AutoencoderDC the latent, or the posterior's mean.
    """
    plain = copy.deepcopy(model).to(device, torch.float32).eval().requires_grad_(False)
    if isinstance(plain, AutoencoderDC):
        plain = plain.without_posterior()
        return {ENCODER: DCEncoderGraph(plain), DECODER: DCDecoderGraph(plain)}
    return {ENCODER: EncoderGraph(plain), DECODER: DecoderGraph(plain)}


def coder_programs(model: Exportable, graphs: dict[str, nn.Module]) -> dict[str, ExportedProgram]:
    """`torch.export` of what `coder_graphs` made of `model`: standard operators only, dynamic batch, height and width.

    The batch is 1 or more; images have sides that are multiples of f, latents at least SMALLEST pixels a side.
    """
    z, channels, f = model.config.latent_channels, model.config.in_channels, model.config.downsampling
    device = next(graphs[ENCODER].parameters()).device
    # traced at sizes that are neither 1 nor equal: torch.export takes a 1 for a constant, and equal sides for one number
    images, latents = (
        torch.zeros(2, channels, 3 * f, 4 * f, device=device),
        torch.zeros(2, z, 3, 4, device=device),
    )
    height, width = Dim("latent_height", min=SMALLEST), Dim("latent_width", min=SMALLEST)
    shapes = {
        ENCODER: {"sample": {0: Dim("batch_size", min=1), 2: f * height, 3: f * width}},
        DECODER: {"latent_sample": {0: Dim("batch_size", min=1), 2: height, 3: width}},
    }
    with torch.no_grad():
        return {
            name: torch.export.export(graphs[name], (example,), dynamic_shapes=shapes[name])
            for name, example in ((ENCODER, images), (DECODER, latents))
        }


def largest_difference(
    model: Exportable,
    name: str,
    graph: nn.Module,
    other: Callable[[Tensor], Tensor],
    device: str | torch.device = "cpu",
) -> float:
    """How far `other` is from `graph`, one of `coder_graphs(model)`, on random inputs of two sizes that no program was traced at.

    Absolute, or relative to the largest value where that is above 1: moments of an untrained model can be large. NaN if either has one.
    """
    z, channels, f = model.config.latent_channels, model.config.in_channels, model.config.downsampling
    generator = torch.Generator().manual_seed(0)
    worst = torch.zeros(())
    for batch, height, width in ((1, 5, 2), (3, 2, 4)):
        shape = (batch, channels, f * height, f * width) if name == ENCODER else (batch, z, height, width)
        x = torch.randn(shape, generator=generator).to(device)
        with torch.no_grad():
            expected, found = graph(x), other(x)
        worst = torch.maximum(
            worst, ((found - expected).abs().amax() / expected.abs().amax().clamp(min=1)).cpu()
        )
    return worst.item()

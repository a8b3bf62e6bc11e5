"""The convolutional KL autoencoder: encoder, diagonal Gaussian, decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from latentae.models.base import Autoencoder, DiagonalGaussian
from latentae.models.blocks import (
    Attention,
    Downsample,
    Level,
    MidBlock,
    ResnetBlock,
    Upsample,
    group_norm,
    recomputed,
    run_block,
)
from latentae.models.config import AutoencoderKLConfig
from latentae.models.layer_steps import Pending, convolve, normalize_activate, normalize_convolve

__all__ = ["AutoencoderKL", "Coder", "Decoder", "Encoder"]


class Coder(nn.Module, ABC):
    """An encoder or decoder: convolution, chains of blocks, normalization, convolution."""

    conv_in: nn.Conv2d
    mid_block: MidBlock
    conv_norm_out: nn.GroupNorm
    conv_out: nn.Conv2d

    @abstractmethod
    def chains(self) -> Sequence[nn.Module]:
        """The chains of blocks in the order in which they run."""

    def forward(
        self, x: Tensor, keep_features: bool = False, checkpointing: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, C_in, H, W] -> [B, C_out, H', W'].

        With `keep_features` it also returns the detached input of the last normalization.
        """
        h = convolve(self.conv_in, x)
        for chain in self.chains():
            h = run_block(chain, h, checkpointing)
        if checkpointing and torch.is_grad_enabled():
            total = Pending(h.value())
            out = recomputed(lambda h: normalize_convolve(self.conv_norm_out, self.conv_out, h)[0], total)
        else:
            out, total = normalize_convolve(self.conv_norm_out, self.conv_out, h)
        return (out.value(), total.value().detach()) if keep_features else out.value()

    @torch.no_grad()
    def activation(self, features: Tensor) -> Tensor:
        """The last convolution's input in at least fp32, from the last normalization's."""
        y = normalize_activate(self.conv_norm_out, features)
        return y.to(torch.promote_types(y.dtype, torch.float32))


def _levels(
    types: Sequence[str],
    widths: Sequence[int],
    layers: int,
    groups: int,
    resample: type[Downsample | Upsample],
) -> nn.ModuleList:
    levels, last = nn.ModuleList(), len(widths) - 1
    for index, (name, width) in enumerate(zip(types, widths, strict=True)):
        before = widths[max(index - 1, 0)]
        step = resample if index < last else None
        levels.append(Level(before, width, layers, groups, name.startswith("Attn"), step))
    return levels


class Encoder(Coder):
    """Image [B, C, H, W] -> moments before the 1x1 convolution, [B, 2z, H/f, W/f]."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups, layers = config.block_out_channels, config.norm_num_groups, config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = _levels(config.down_block_types, widths, layers, groups, Downsample)
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = group_norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def chains(self) -> Sequence[nn.Module]:
        """Levels from fine to coarse, then the middle."""
        return *self.down_blocks, self.mid_block


class Decoder(Coder):
    """Latent [B, z, h, w] -> image [B, C, f*h, f*w]."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = _levels(config.up_block_types, widths, config.layers_per_block + 1, groups, Upsample)
        self.conv_norm_out = group_norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def chains(self) -> Sequence[nn.Module]:
        """The middle, then levels from coarse to fine."""
        return self.mid_block, *self.up_blocks


class AutoencoderKL(Autoencoder):
    """The autoencoder of latent diffusion (Rombach et al. 2022), with diffusers' keys."""

    branches = (ResnetBlock, Attention)
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
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @torch.no_grad()
    def decoder_weight_gradient(self, features: Tensor, gradient: Tensor) -> Tensor:
        """See `Autoencoder`."""
        with torch.autocast(features.device.type, enabled=False):
            activation = self.decoder.activation(features)
            shape = [gradient.shape[1], *self.decoder.conv_out.weight.shape[1:]]
            return conv2d_weight(activation, shape, gradient.to(activation.dtype), padding=1)

    def encoder_weight_gradient(self, features: Tensor, noise: Tensor | None, gradient: Tensor) -> Tensor:
        """See `Autoencoder`."""
        convs = [self.encoder.conv_out, *([] if self.quant_conv is None else [self.quant_conv])]
        with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
            x = self.encoder.activation(features)
            weights = [conv.weight.detach().to(x.dtype) for conv in convs]
            weights[0].requires_grad_()
            for conv, weight in zip(convs, weights, strict=True):
                assert conv.bias is not None
                x = F.conv2d(x, weight, conv.bias.detach().to(x.dtype), padding=weight.shape[-1] // 2)
            posterior = DiagonalGaussian(x)
            latent = posterior.mode() if noise is None else posterior.sample(noise=noise.to(x.dtype))
            return torch.autograd.grad(latent, weights[0], gradient.to(x.dtype))[0]

    def _parts(self) -> dict[str, Sequence[nn.Module | None]]:
        encoder, decoder = self.encoder, self.decoder
        before = (encoder.down_blocks[-1], encoder.mid_block, encoder.conv_norm_out, encoder.conv_out)
        after = (decoder.conv_in, decoder.mid_block, decoder.up_blocks[0])
        return {
            "encoder": [encoder, self.quant_conv],
            "decoder": [self.post_quant_conv, decoder],
            "decoder-head": [decoder.up_blocks[-1], decoder.conv_norm_out, decoder.conv_out],
            "latent": [*before, self.quant_conv, self.post_quant_conv, *after],
        }

    def _encode(self, x: Tensor, keep_features: bool) -> tuple[DiagonalGaussian, Tensor | None]:
        moments, features = self._run(self.encoder, x, keep_features)
        return DiagonalGaussian(moments if self.quant_conv is None else self.quant_conv(moments)), features

    def _decode(self, z: Tensor, keep_features: bool) -> tuple[Tensor, Tensor | None]:
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self._run(self.decoder, z, keep_features)

"""Encoder and decoder: levels of residual blocks around a middle block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from latentae.models.blocks import (
    Attention,
    Chain,
    Downsample,
    MidBlock,
    ResnetBlock,
    Upsample,
    group_norm,
    recomputed,
    run_chain,
)
from latentae.models.config import AutoencoderKLConfig
from latentae.models.pending import Pending, convolve, normalize_convolve

__all__ = ["Decoder", "Encoder"]


class Level(Chain):
    """Residual blocks at one resolution, each followed by attention if the level has it, then a change of resolution.

    The resampler's attribute name differs between the two coders (`downsamplers`, `upsamplers`) because diffusers' keys do.
    """

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList([ResnetBlock(width, out_channels, groups) for width in widths])
        self.attentions = nn.ModuleList(
            [Attention(out_channels, groups) for _ in range(layers)] if attention else []
        )

    def blocks(self) -> Iterator[nn.Module]:
        """Residual blocks, each with its attention."""
        for index, resnet in enumerate(self.resnets):
            yield resnet
            if self.attentions:
                yield self.attentions[index]


class DownLevel(Level):
    """A level of the encoder. [B, C_in, H, W] -> [B, C_out, H/2, W/2], or the same size in the last level."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, attention: bool, last: bool
    ) -> None:
        super().__init__(in_channels, out_channels, layers, groups, attention)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out_channels)])

    def blocks(self) -> Iterator[nn.Module]:
        """The level's blocks, then the halving."""
        yield from super().blocks()
        yield from self.downsamplers


class UpLevel(Level):
    """A level of the decoder. [B, C_in, H, W] -> [B, C_out, 2H, 2W], or the same size in the last level."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, attention: bool, last: bool
    ) -> None:
        super().__init__(in_channels, out_channels, layers, groups, attention)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out_channels)])

    def blocks(self) -> Iterator[nn.Module]:
        """The level's blocks, then the doubling."""
        yield from super().blocks()
        yield from self.upsamplers


class Coder(nn.Module):
    """What encoder and decoder share: their last layers, and the form of their output."""

    conv_norm_out: nn.GroupNorm
    conv_out: nn.Conv2d

    def _finish(self, h: Pending, keep_features: bool, checkpointing: bool) -> Tensor | tuple[Tensor, Tensor]:
        """The output, with the detached input of the last normalization if `keep_features`."""
        if checkpointing and torch.is_grad_enabled():
            total = Pending(h.value())
            out = recomputed(lambda h: normalize_convolve(self.conv_norm_out, self.conv_out, h)[0], total)
        else:
            out, total = normalize_convolve(self.conv_norm_out, self.conv_out, h)
        return (out.value(), total.value().detach()) if keep_features else out.value()


class Encoder(Coder):
    """Image [B, C, H, W] -> moments before the 1x1 convolution, [B, 2z, H/f, W/f]."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            attention = config.down_block_types[level].startswith("Attn")
            before, last = widths[max(level - 1, 0)], level == len(widths) - 1
            self.down_blocks.append(
                DownLevel(before, width, config.layers_per_block, groups, attention, last)
            )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = group_norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(
        self, x: Tensor, keep_features: bool = False, checkpointing: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, C, H, W] -> [B, 2z, H/f, W/f]; with `keep_features` also the input of the last normalization, detached."""
        h = convolve(self.conv_in, x)
        for level in (*self.down_blocks, self.mid_block):
            h = run_chain(level, h, checkpointing)
        return self._finish(h, keep_features, checkpointing)


class Decoder(Coder):
    """Latent [B, z, h, w] -> image [B, C, f*h, f*w]."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            attention = config.up_block_types[level].startswith("Attn")
            before, last = widths[max(level - 1, 0)], level == len(widths) - 1
            self.up_blocks.append(
                UpLevel(before, width, config.layers_per_block + 1, groups, attention, last)
            )
        self.conv_norm_out = group_norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(
        self, z: Tensor, keep_features: bool = False, checkpointing: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, z, h, w] -> [B, C, f*h, f*w]; with `keep_features` also the input of the last normalization, detached."""
        h = convolve(self.conv_in, z)
        for level in (self.mid_block, *self.up_blocks):
            h = run_chain(level, h, checkpointing)
        return self._finish(h, keep_features, checkpointing)

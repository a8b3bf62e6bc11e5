"""Encoder and decoder: levels of residual blocks around a middle block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentae.models.blocks import (
    Attention,
    Downsample,
    MidBlock,
    ResnetBlock,
    Upsample,
    group_norm,
    recomputed,
    run_block,
)
from latentae.models.config import AutoencoderKLConfig
from latentae.models.pending import Pending, convolve, normalize_convolve

__all__ = ["Decoder", "Encoder"]


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if the level has it, then a change of resolution.

    The resampler's attribute name differs between the two coders (`downsamplers`, `upsamplers`) because diffusers' keys do.
    """

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, attention: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList([ResnetBlock(width, out_channels, groups) for width in widths])
        self.attentions = nn.ModuleList([Attention(out_channels, groups) for _ in range(layers)] if attention else [])

    def forward(self, x: Pending, checkpointing: bool = False) -> Pending:
        """[B, C_in, H, W] -> [B, C_out, H, W]."""
        for index, resnet in enumerate(self.resnets):
            x = run_block(resnet, x, checkpointing)
            if self.attentions:
                x = run_block(self.attentions[index], x, checkpointing)
        return x


class DownLevel(Level):
    """A level of the encoder."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, attention: bool, last: bool) -> None:
        super().__init__(in_channels, out_channels, layers, groups, attention)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out_channels)])

    def forward(self, x: Pending, checkpointing: bool = False) -> Pending:
        """[B, C_in, H, W] -> [B, C_out, H/2, W/2], or the same size in the last level."""
        x = super().forward(x, checkpointing)
        for downsample in self.downsamplers:
            x = run_block(downsample, x, checkpointing)
        return x


class UpLevel(Level):
    """A level of the decoder."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, attention: bool, last: bool) -> None:
        super().__init__(in_channels, out_channels, layers, groups, attention)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out_channels)])

    def forward(self, x: Pending, checkpointing: bool = False) -> Pending:
        """[B, C_in, H, W] -> [B, C_out, 2H, 2W], or the same size in the last level."""
        x = super().forward(x, checkpointing)
        for upsample in self.upsamplers:
            x = run_block(upsample, x, checkpointing)
        return x


class Coder(nn.Module):
    """What encoder and decoder share: their last layers."""

    conv_norm_out: nn.GroupNorm
    conv_out: nn.Conv2d

    def _finish(self, h: Pending, keep_features: bool, checkpointing: bool) -> tuple[Tensor, Tensor | None]:
        """The output, and the detached input of the last normalization where it is asked for."""
        if checkpointing and torch.is_grad_enabled():
            h = Pending(h.value())
            out = recomputed(lambda h: normalize_convolve(self.conv_norm_out, self.conv_out, h)[0], h)
            return out.value(), h.x.detach() if keep_features else None
        out, total = normalize_convolve(self.conv_norm_out, self.conv_out, h)
        return out.value(), total.value().detach() if keep_features else None


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
            self.down_blocks.append(DownLevel(before, width, config.layers_per_block, groups, attention, last))
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = group_norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor, keep_features: bool = False, checkpointing: bool = False) -> tuple[Tensor, Tensor | None]:
        """[B, C, H, W] -> [B, 2z, H/f, W/f], and what the last normalization read if `keep_features`."""
        h = convolve(self.conv_in, x)
        for level in self.down_blocks:
            h = level(h, checkpointing)
        return self._finish(self.mid_block(h, checkpointing), keep_features, checkpointing)


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
            self.up_blocks.append(UpLevel(before, width, config.layers_per_block + 1, groups, attention, last))
        self.conv_norm_out = group_norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor, keep_features: bool = False, checkpointing: bool = False) -> tuple[Tensor, Tensor | None]:
        """[B, z, h, w] -> [B, C, f*h, f*w], and what the last normalization read if `keep_features`."""
        h = self.mid_block(convolve(self.conv_in, z), checkpointing)
        for level in self.up_blocks:
            h = level(h, checkpointing)
        return self._finish(h, keep_features, checkpointing)

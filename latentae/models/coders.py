"""Encoder and decoder: levels of residual blocks around a middle block."""

from __future__ import annotations

from torch import Tensor, nn

from latentae.models.blocks import Attention, Downsample, MidBlock, ResnetBlock, Upsample, group_norm
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

    def forward(self, x: Pending) -> Pending:
        """[B, C_in, H, W] -> [B, C_out, H, W]."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[index](x)
        return x


class DownLevel(Level):
    """A level of the encoder."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, attention: bool, last: bool) -> None:
        super().__init__(in_channels, out_channels, layers, groups, attention)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out_channels)])

    def forward(self, x: Pending) -> Pending:
        """[B, C_in, H, W] -> [B, C_out, H/2, W/2], or the same size in the last level."""
        x = super().forward(x)
        for downsample in self.downsamplers:
            x = downsample(x.value())
        return x


class UpLevel(Level):
    """A level of the decoder."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, attention: bool, last: bool) -> None:
        super().__init__(in_channels, out_channels, layers, groups, attention)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out_channels)])

    def forward(self, x: Pending) -> Pending:
        """[B, C_in, H, W] -> [B, C_out, 2H, 2W], or the same size in the last level."""
        x = super().forward(x)
        for upsample in self.upsamplers:
            x = upsample(x.value())
        return x


class Encoder(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 2z, H/f, W/f]."""
        h = convolve(self.conv_in, x)
        for level in self.down_blocks:
            h = level(h)
        return normalize_convolve(self.conv_norm_out, self.conv_out, self.mid_block(h))[0].value()


class Decoder(nn.Module):
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

    def forward(self, z: Tensor) -> Tensor:
        """[B, z, h, w] -> [B, C, f*h, f*w]."""
        h = self.mid_block(convolve(self.conv_in, z))
        for level in self.up_blocks:
            h = level(h)
        return normalize_convolve(self.conv_norm_out, self.conv_out, h)[0].value()

"""The layers of the LDM autoencoder; attribute names give diffusers' state-dict keys."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from latentae.models.pending import Pending, attend, convolve, residual_step, upsample_convolve

__all__ = ["Attention", "Downsample", "MidBlock", "ResnetBlock", "Upsample", "group_norm"]


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    """GroupNorm with LDM's eps, 1e-6."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two norm-activation-convolution steps around a skip; a 1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Pending) -> Pending:
        """[B, C_in, H, W] -> [B, C_out, H, W]."""
        return residual_step(self, x)


class Attention(nn.Module):
    """Single-head self-attention over all pixels, around a skip."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = group_norm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Pending) -> Pending:
        """[B, C, H, W] -> the same shape."""
        return attend(self, x)


class Downsample(nn.Module):
    """Halve height and width by a strided convolution, padded at the right and bottom only, as LDM does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Pending:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return convolve(self.conv, F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Pending:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return upsample_convolve(self.conv, x)


class MidBlock(nn.Module):
    """Residual block, attention (or none), residual block."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])

    def forward(self, x: Pending) -> Pending:
        """[B, C, H, W] -> the same shape."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)

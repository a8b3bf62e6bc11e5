"""The layers of the LDM autoencoder; attribute names give diffusers' state-dict keys."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from latentae_kernels import norm_act
from torch import Tensor, nn

__all__ = ["Attention", "Downsample", "GroupNormAct", "MidBlock", "ResnetBlock", "Upsample"]


class GroupNormAct(nn.GroupNorm):
    """GroupNorm followed by an activation, through the fused op; eps 1e-6 as in LDM."""

    def __init__(self, groups: int, channels: int, act: Literal["silu", "identity"] = "silu") -> None:
        super().__init__(groups, channels, eps=1e-6)
        self.act: Literal["silu", "identity"] = act

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, *spatial] -> the same shape."""
        return norm_act(x, self.weight, self.bias, self.num_groups, self.eps, self.act)


class ResnetBlock(nn.Module):
    """Two norm-activation-convolution steps around a skip; a 1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNormAct(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNormAct(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W]."""
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Attention(nn.Module):
    """Single-head self-attention over all pixels, around a skip."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNormAct(groups, channels, act="identity")
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = (layer(tokens).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))  # [B, 1 head, HW, C]
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.to_out[0](mixed).transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """Halve height and width by a strided convolution, padded at the right and bottom only, as LDM does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class MidBlock(nn.Module):
    """Residual block, attention (or none), residual block."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)

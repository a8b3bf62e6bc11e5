"""The layers of the LDM autoencoder; attribute names give diffusers' state-dict keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentae.models.pending import Pending, attend, convolve, residual_step, upsample_convolve

__all__ = ["Attention", "Downsample", "MidBlock", "ResnetBlock", "Upsample", "group_norm", "recomputed", "run_block"]


def run_block(block: nn.Module, x: Pending, checkpointing: bool) -> Pending:
    """Call a block with the least memory that its gradient needs.

    A block that doesn't learn, and behind which nothing does, runs as in inference: no graph, additions in place. With
    `checkpointing` the others keep their input only (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    """
    if not torch.is_grad_enabled():
        return block(x)
    if not any(t is not None and t.requires_grad for t in x) and not any(p.requires_grad for p in block.parameters()):
        with torch.no_grad():
            return block(x)
    return recomputed(block, x) if checkpointing else block(x)


def recomputed(step: Callable[[Pending], Pending], x: Pending) -> Pending:
    """`step(x)`, run once more in the backward pass instead of remembered.

    Pending additions are made first: one sum is less to keep than its parts. Nothing here draws random numbers, so no state of a
    generator is kept.
    """

    def plain(value: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(step(Pending(value)))

    return Pending(*checkpoint(plain, x.value(), use_reentrant=False, preserve_rng_state=False))  # pyright: ignore


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

    def forward(self, x: Pending) -> Pending:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return convolve(self.conv, F.pad(x.value(), (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Pending) -> Pending:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return upsample_convolve(self.conv, x.value())


class MidBlock(nn.Module):
    """Residual block, attention (or none), residual block."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])

    def forward(self, x: Pending, checkpointing: bool = False) -> Pending:
        """[B, C, H, W] -> the same shape."""
        for block in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = run_block(block, x, checkpointing)
        return x

"""Encoder and decoder: levels of blocks, and what changes resolution between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.utils.checkpoint import checkpoint

from latentae.models.blocks import is_frozen
from latentae.models.dc.blocks import (
    AttentionBlock,
    Down,
    ResidualBlock,
    RMSNorm,
    Up,
    add,
    grouped_mean,
    normalize_activate,
    repeated,
)
from latentae.models.dc.config import AutoencoderDCConfig, per_level
from latentae.models.plain import is_plain

__all__ = ["DCDecoder", "DCEncoder"]


def _block(kind: str, width: int, windows: tuple[int, ...], head: int, norm: str, act: str) -> nn.Module:
    return (
        ResidualBlock(width, norm, act) if kind == "ResBlock" else AttentionBlock(width, head, windows, norm)
    )


def _run(step: nn.Module, x: Tensor, checkpointing: bool) -> Tensor:
    """Call a layer with the least memory that its gradient needs.

    Frozen layers with frozen input run as in inference. With `checkpointing` the others keep their input only
    (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"). Nothing here draws random numbers.
    """
    if not torch.is_grad_enabled():
        return step(x)
    if not x.requires_grad and is_frozen(step):
        with torch.no_grad():
            return step(x)
    return checkpoint(step, x, use_reentrant=False, preserve_rng_state=False) if checkpointing else step(x)  # pyright: ignore


def _run_level(level: nn.Module, x: Tensor, checkpointing: bool) -> Tensor:
    """Run the blocks of a level; one that is replaced or hooked is called as a single block."""
    if not (isinstance(level, nn.Sequential) and is_plain(level, nn.Sequential)):
        return _run(level, x, checkpointing)
    for step in level:
        x = _run(step, x, checkpointing)
    return x


class DCEncoder(nn.Module):
    """Image [B, C, H, W] -> latent [B, z, H/f, W/f], or with a posterior its moments [B, 2z, H/f, W/f]."""

    def __init__(self, config: AutoencoderDCConfig) -> None:
        super().__init__()
        levels, head = config.side("encoder"), config.attention_head_dim
        strided = config.downsample_block_type != "pixel_unshuffle"
        widths, z = config.encoder_block_out_channels, config.latent_channels
        if levels[0][2]:
            self.conv_in: nn.Module = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        else:
            self.conv_in = Down(config.in_channels, widths[1], strided, shortcut=False)
        self.down_blocks = nn.ModuleList()
        for level, (kind, width, layers, windows) in enumerate(levels):
            blocks = [_block(kind, width, windows, head, "rms_norm", "silu") for _ in range(layers)]
            if layers and level < len(levels) - 1:
                blocks.append(Down(width, widths[level + 1], strided))
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(widths[-1], z, 3, padding=1)
        self.conv_out_logvar = (
            nn.Conv2d(widths[-1], z, 3, padding=1) if config.bottleneck == "gaussian" else None
        )
        if self.conv_out_logvar is not None:  # the same spread everywhere, until something is learned of it
            nn.init.zeros_(self.conv_out_logvar.weight)
            nn.init.zeros_(self.conv_out_logvar.bias)  # pyright: ignore[reportArgumentType]
        self.latent_channels, self.out_shortcut = z, config.encoder_out_shortcut

    def forward(
        self, x: Tensor, keep_features: bool = False, checkpointing: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, C, H, W] -> [B, z or 2z, H/f, W/f]; with `keep_features` also the input of the last convolution, detached."""
        h = _run(self.conv_in, x, False)
        for level in self.down_blocks:
            h = _run_level(level, h, checkpointing)
        mean = self.conv_out(h)
        if self.out_shortcut:
            mean = add(
                mean, grouped_mean(h, self.latent_channels), overwrite=is_plain(self.conv_out, nn.Conv2d)
            )
        moments = mean if self.conv_out_logvar is None else torch.cat([mean, self.conv_out_logvar(h)], dim=1)
        return (moments, h.detach()) if keep_features else moments

    @torch.no_grad()
    def weight_gradient(self, features: Tensor, gradient: Tensor) -> Tensor:
        """d sum(gradient * mean) / d conv_out.weight, [z, C, 3, 3]."""
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        return conv2d_weight(wide, self.conv_out.weight.shape, gradient.to(wide.dtype), padding=1)


class DCDecoder(nn.Module):
    """Latent [B, z, h, w] -> image [B, C, f*h, f*w]."""

    def __init__(self, config: AutoencoderDCConfig) -> None:
        super().__init__()
        levels, head = config.side("decoder"), config.attention_head_dim
        interpolate = config.upsample_block_type == "interpolate"
        widths, (first, *_) = config.decoder_block_out_channels, levels
        norms, acts = (
            per_level(names, len(levels)) for names in (config.decoder_norm_types, config.decoder_act_fns)
        )
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList()
        for level, (kind, width, layers, windows) in enumerate(levels):
            blocks = [
                _block(kind, width, windows, head, norms[level], acts[level].lower()) for _ in range(layers)
            ]
            if layers and level < len(levels) - 1:
                blocks.insert(0, Up(widths[level + 1], width, interpolate))
            self.up_blocks.append(nn.Sequential(*blocks))
        width = widths[0] if first[2] else widths[1]
        self.norm_out = RMSNorm(width)
        self.act = config.decoder_conv_act_fn.lower()
        if first[2]:
            self.conv_out: nn.Conv2d | Up = nn.Conv2d(width, config.in_channels, 3, padding=1)
        else:
            self.conv_out = Up(width, config.in_channels, interpolate, shortcut=False)
        self.width, self.in_shortcut = widths[-1], config.decoder_in_shortcut

    def forward(
        self, z: Tensor, keep_features: bool = False, checkpointing: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, z, h, w] -> [B, C, f*h, f*w]; with `keep_features` also the input of the last normalization, detached."""
        h = _run(self.conv_in, z, False)
        if self.in_shortcut:
            h = add(h, repeated(z, self.width), overwrite=is_plain(self.conv_in, nn.Conv2d))
        for level in reversed(self.up_blocks):
            h = _run_level(level, h, checkpointing)
        if checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._finish, h, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore
        else:
            out = self._finish(h)
        return (out, h.detach()) if keep_features else out

    def activated(self, h: Tensor) -> Tensor:
        """What the last layer reads, of what the last normalization did."""
        return normalize_activate(self.norm_out, h, self.act)

    @torch.no_grad()
    def weight_gradient(self, features: Tensor, gradient: Tensor) -> Tensor:
        """d sum(gradient * image) / d weight of the last convolution; several gradients may be stacked over channels."""
        last = self.conv_out
        activation = self.activated(features)
        activation = activation.to(torch.promote_types(activation.dtype, torch.float32))
        if isinstance(last, Up):
            activation, gradient, last = last.to_conv(activation), last.to_conv_output(gradient), last.conv
        shape = (gradient.shape[1], *last.weight.shape[1:])
        return conv2d_weight(activation, list(shape), gradient.to(activation.dtype), padding=1)

    def _finish(self, h: Tensor) -> Tensor:
        return self.conv_out(self.activated(h))

"""The deep-compression autoencoder, with diffusers' state-dict keys and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from latentae.models.base import Autoencoder, DiagonalGaussian
from latentae.models.blocks import recomputed, run_block
from latentae.models.config import AutoencoderDCConfig, Level
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
from latentae.models.layer_steps import Pending, is_plain

__all__ = ["AutoencoderDC", "DCDecoder", "DCEncoder"]

HEAD = "encoder.conv_out_logvar."


def _block(level: Level, head: int, norm: str, act: str) -> nn.Module:
    if level.block == "ResBlock":
        return ResidualBlock(level.width, norm, act)
    return AttentionBlock(level.width, head, level.windows, norm)


def _run_level(level: nn.Module, x: Pending, checkpointing: bool) -> Pending:
    """Run the blocks of a level; a level that is replaced or hooked is called as a module."""
    blocks = level if isinstance(level, nn.Sequential) and is_plain(level, nn.Sequential) else [level]
    for block in blocks:
        x = run_block(block, x, checkpointing)
    return x


class DCEncoder(nn.Module):
    """Image [B, C, H, W] -> latent [B, z, H/f, W/f], or moments [B, 2z, H/f, W/f]."""

    def __init__(self, config: AutoencoderDCConfig) -> None:
        super().__init__()
        levels, head, z = config.side("encoder"), config.attention_head_dim, config.latent_channels
        strided = config.per_level("downsample_block_type")[0] != "pixel_unshuffle"
        widths = config.encoder_block_out_channels
        if levels[0].layers:
            self.conv_in: nn.Module = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        else:
            self.conv_in = Down(config.in_channels, widths[1], strided, shortcut=False)
        self.down_blocks = nn.ModuleList()
        for index, level in enumerate(levels):
            blocks = [_block(level, head, "rms_norm", "silu") for _ in range(level.layers)]
            if blocks and index < len(levels) - 1:
                blocks.append(Down(level.width, widths[index + 1], strided))
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(widths[-1], z, 3, padding=1)
        gaussian = config.bottleneck == "gaussian"
        self.conv_out_logvar = nn.Conv2d(widths[-1], z, 3, padding=1) if gaussian else None
        if self.conv_out_logvar is not None:  # starts with the same variance everywhere
            nn.init.zeros_(self.conv_out_logvar.weight)
            nn.init.zeros_(self.conv_out_logvar.bias)  # pyright: ignore[reportArgumentType]
        self.latent_channels, self.out_shortcut = z, config.encoder_out_shortcut

    def forward(
        self, x: Tensor, keep_features: bool = False, checkpointing: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, C, H, W] -> [B, z or 2z, H/f, W/f].

        With `keep_features` it also returns the detached input of the last convolution.
        """
        pending = run_block(self.conv_in, Pending(x))
        for level in self.down_blocks:
            pending = _run_level(level, pending, checkpointing)
        h = pending.value()
        mean = self.conv_out(h)
        if self.out_shortcut:
            mean = add(
                mean, grouped_mean(h, self.latent_channels), overwrite=is_plain(self.conv_out, nn.Conv2d)
            )
        moments = mean if self.conv_out_logvar is None else torch.cat([mean, self.conv_out_logvar(h)], dim=1)
        return (moments, h.detach()) if keep_features else moments


class DCDecoder(nn.Module):
    """Latent [B, z, h, w] -> image [B, C, f*h, f*w]."""

    def __init__(self, config: AutoencoderDCConfig) -> None:
        super().__init__()
        levels, head = config.side("decoder"), config.attention_head_dim
        interpolate = config.upsample_block_type == "interpolate"
        widths = config.decoder_block_out_channels
        norms, acts = config.per_level("decoder_norm_types"), config.per_level("decoder_act_fns")
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList()
        for index, level in enumerate(levels):
            blocks = [_block(level, head, norms[index], acts[index]) for _ in range(level.layers)]
            if blocks and index < len(levels) - 1:
                blocks.insert(0, Up(widths[index + 1], level.width, interpolate))
            self.up_blocks.append(nn.Sequential(*blocks))
        width = widths[0] if levels[0].layers else widths[1]
        self.norm_out = RMSNorm(width)
        self.act = config.decoder_conv_act_fn.lower()
        if levels[0].layers:
            self.conv_out: nn.Conv2d | Up = nn.Conv2d(width, config.in_channels, 3, padding=1)
        else:
            self.conv_out = Up(width, config.in_channels, interpolate, shortcut=False)
        self.width, self.in_shortcut = widths[-1], config.decoder_in_shortcut

    def forward(
        self, z: Tensor, keep_features: bool = False, checkpointing: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, z, h, w] -> [B, C, f*h, f*w].

        With `keep_features` it also returns the detached input of the last normalization.
        """
        h = run_block(self.conv_in, Pending(z))
        if self.in_shortcut:
            fresh = is_plain(self.conv_in, nn.Conv2d)
            h = Pending(add(h.value(), repeated(z, self.width), overwrite=fresh))
        for level in reversed(self.up_blocks):
            h = _run_level(level, h, checkpointing)
        finish = recomputed if checkpointing and torch.is_grad_enabled() else lambda step, h: step(h)
        out = finish(self._finish, h).value()
        return (out, h.value().detach()) if keep_features else out

    def _finish(self, h: Pending) -> Pending:
        return Pending(self.conv_out(normalize_activate(self.norm_out, h.value(), self.act)))


class AutoencoderDC(Autoencoder):
    """diffusers' AutoencoderDC, also for training (DC-AE, Chen et al. 2024, arXiv 2410.10733).

    Steps of two move space to channels and back. Each has a shortcut without parameters that
    averages or repeats channels, so that a network of many levels still trains. The published
    models are deterministic. With `bottleneck = "gaussian"` a second head predicts a log-variance,
    so that a posterior can be trained. `without_posterior`, and with it an export, keeps the
    posterior's mean.
    """

    branches = (ResidualBlock, AttentionBlock)
    config: AutoencoderDCConfig
    encoder: DCEncoder
    decoder: DCDecoder

    def __init__(self, config: AutoencoderDCConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = DCEncoder(config)
        self.decoder = DCDecoder(config)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @torch.no_grad()
    def decoder_weight_gradient(self, features: Tensor, gradient: Tensor) -> Tensor:
        """See `Autoencoder`."""
        last = self.decoder.conv_out
        with torch.autocast(features.device.type, enabled=False):
            activation = normalize_activate(self.decoder.norm_out, features, self.decoder.act)
            activation = activation.to(torch.promote_types(activation.dtype, torch.float32))
            if isinstance(last, Up):
                activation, gradient, last = (
                    last.to_conv(activation),
                    last.to_conv_output(gradient),
                    last.conv,
                )
            shape = [gradient.shape[1], *last.weight.shape[1:]]
            return conv2d_weight(activation, shape, gradient.to(activation.dtype), padding=1)

    @torch.no_grad()
    def encoder_weight_gradient(self, features: Tensor, noise: Tensor | None, gradient: Tensor) -> Tensor:
        """See `Autoencoder`."""
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        with torch.autocast(features.device.type, enabled=False):
            shape = self.encoder.conv_out.weight.shape
            return conv2d_weight(wide, shape, gradient.to(wide.dtype), padding=1)

    def _parts(self) -> dict[str, Sequence[nn.Module | None]]:
        encoder, decoder = self.encoder, self.decoder
        down = [level for level in encoder.down_blocks if len(level)]  # pyright: ignore[reportArgumentType]
        up = [level for level in decoder.up_blocks if len(level)]  # pyright: ignore[reportArgumentType]
        return {
            "encoder": [encoder],
            "decoder": [decoder],
            "decoder-head": [*up[:1], decoder.norm_out, decoder.conv_out],
            "latent": [*down[-1:], encoder.conv_out, encoder.conv_out_logvar, decoder.conv_in, *up[-1:]],
        }

    def without_posterior(self) -> AutoencoderDC:
        """The deterministic model whose latent is the mean, with shared weights."""
        if self.config.bottleneck == "deterministic":
            return self
        with torch.device("meta"):
            plain = AutoencoderDC(self.config.model_copy(update={"bottleneck": "deterministic"}))
        plain.load_state_dict(_without_head(self.state_dict(keep_vars=True)), assign=True)
        return plain.train(self.training)

    def with_own_head(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fit the state dict of another such model: drop the posterior's head, or add this model's.

        So training with a posterior can start from a published model, which has no such head.
        """
        if self.config.bottleneck == "deterministic":
            return _without_head(state)
        own = {name: value for name, value in self.state_dict().items() if name.startswith(HEAD)}
        return {**own, **state}

    def _encode(self, x: Tensor, keep_features: bool) -> tuple[DiagonalGaussian, Tensor | None]:
        moments, features = self._run(self.encoder, x, keep_features)
        of = DiagonalGaussian.of_mean if self.config.bottleneck == "deterministic" else DiagonalGaussian
        return of(moments), features

    def _decode(self, z: Tensor, keep_features: bool) -> tuple[Tensor, Tensor | None]:
        return self._run(self.decoder, z, keep_features)


def _without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(HEAD)}

"""Discriminators of reconstructions and photos, by patches, by pixels or by pretrained features.

Each maps images [B, C, H, W] in [-1, 1] to a tuple of logit maps [B, 1, h, w], is twice
differentiable (gradient penalties), and judges each image independently of its batch. There is no
spectral normalization: its power iteration advances at every forward pass, so that weights would
depend on how a batch is split. There are no batch statistics: they leak between the samples of a
batch and differ between ranks.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from latentae_kernels import group_norm
from torch import Tensor, nn

from latentae.models.backbone import FrozenBackbone

__all__ = ["FeatureDiscriminator", "Norm", "PatchDiscriminator", "UNetDiscriminator"]

Norm = Literal["none", "group", "instance"]


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): 4x4 convolutions, LeakyReLU 0.2, weights from N(0, 0.02).

    Args:
        in_channels: image channels.
        channels: filters of the first layer; doubled per layer up to eight times.
        layers: strided layers; 3 gives 70-pixel patches.
        norm: normalization of the inner layers.
    """

    def __init__(
        self, in_channels: int = 3, channels: int = 64, layers: int = 3, norm: Norm = "group"
    ) -> None:
        super().__init__()
        modules: list[nn.Module] = [*_layer(in_channels, channels, 4, 2, "none")]
        width = channels
        for index in range(1, layers + 1):
            before, width = width, channels * min(2**index, 8)
            modules += _layer(before, width, 4, 2 if index < layers else 1, norm)
        modules.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*modules)
        self.minimum_size = 3 * 2**layers  # a smaller image leaves no patch after the two stride-1 layers
        self.apply(_initialize)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [B, C, H, W] in [-1, 1] -> one map of logits [B, 1, h, w], one logit per patch."""
        return (self.layers(x),)


class UNetDiscriminator(nn.Module):
    """U-Net GAN's discriminator (Schonfeld et al. 2020, section 3.1) with PatchGAN's layers.

    Its bottleneck gives one logit per patch instead of one per image, so that images may have any
    size. The decoder with skip connections gives one logit per pixel.

    Args:
        in_channels: image channels.
        channels: filters of the first layer; doubled per layer up to eight times.
        layers: strided layers of the encoder.
        norm: normalization of the inner layers.
    """

    def __init__(
        self, in_channels: int = 3, channels: int = 64, layers: int = 3, norm: Norm = "group"
    ) -> None:
        super().__init__()
        widths = [in_channels, *(channels * min(2**index, 8) for index in range(layers))]
        self.down = nn.ModuleList(
            _layer(before, after, 4, 2, norm if index else "none")
            for index, (before, after) in enumerate(itertools.pairwise(widths))
        )
        self.bottleneck = nn.Conv2d(widths[-1], 1, 1)
        self.up = nn.ModuleList(
            _layer(
                widths[index] + widths[index - 1], widths[index - 1] if index > 1 else channels, 3, 1, norm
            )
            for index in range(layers, 0, -1)
        )
        self.pixels = nn.Conv2d(channels, 1, 1)
        self.minimum_size = 2**layers * _smallest_map(norm)
        self.apply(_initialize)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [B, C, H, W] in [-1, 1] -> logits [B, 1, h, w] of patches and [B, 1, H, W]."""
        maps = [x]
        for layer in self.down:
            maps.append(layer(maps[-1]))
        h = maps.pop()
        patches = self.bottleneck(h)
        for layer in self.up:
            skip = maps.pop()
            h = F.interpolate(h, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            h = layer(torch.cat([h, skip], dim=1))
        return patches, self.pixels(h)


class FeatureDiscriminator(nn.Module):
    """Small heads on the feature maps of a frozen backbone.

    Sauer et al. 2021, "Projected GANs"; with DINO: StyleGAN-T, 2023. Only the heads are trained and
    in state_dict(). Each is a 1x1 convolution, a residual 3x3 one and one logit per pixel of its
    map. The published heads also use spectral norm and batch statistics.

    Args:
        backbone: in evaluation mode, without gradients.
        channels: width of the heads.
        norm: normalization inside them.
        maps: number of feature maps with a head, evenly spread over depth; at most those of the
            backbone.
    """

    def __init__(
        self, backbone: FrozenBackbone, channels: int = 64, norm: Norm = "group", maps: int = 4
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.maps = min(maps, len(backbone.channels))
        self.heads = nn.ModuleList(
            _Head(width, channels, norm) for width in backbone.feature_channels(self.maps)
        )
        self.minimum_size = backbone.minimum_size * _smallest_map(norm)
        self.apply(_initialize)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [B, 3, H, W] in [-1, 1] -> a map of logits [B, 1, h, w] per feature map."""
        features = self.backbone.features(x, self.maps)
        return tuple(head(map_) for head, map_ in zip(self.heads, features, strict=True))


class _Head(nn.Module):
    def __init__(self, in_channels: int, channels: int, norm: Norm) -> None:
        super().__init__()
        self.enter = _layer(in_channels, channels, 1, 1, norm)
        self.residual = _layer(channels, channels, 3, 1, norm)
        self.logit = nn.Conv2d(channels, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        h = self.enter(features)
        return self.logit(h + self.residual(h))


def _layer(before: int, after: int, kernel: int, stride: int, norm: Norm) -> nn.Sequential:
    convolution = nn.Conv2d(
        before, after, kernel, stride=stride, padding=(kernel - 1) // 2, bias=norm == "none"
    )
    return nn.Sequential(convolution, *_norm(norm, after), nn.LeakyReLU(0.2))


def _smallest_map(norm: Norm) -> int:
    """Shortest side of the coarsest map: instance norm needs the variance of several pixels."""
    return 2 if norm == "instance" else 1


def _norm(norm: Norm, channels: int) -> list[nn.Module]:
    """The normalization of a convolution; groups have at least four channels, or one.

    torch's InstanceNorm2d copies its input to channels first. For one image its CPU gradient is
    wrong if dy is channels_last.
    """
    if norm == "none":
        return []
    groups = max(count for count in range(1, min(32, channels // 4) + 1) if channels % count == 0)
    return [_GroupNorm(channels if norm == "instance" else groups, channels)]


class _GroupNorm(nn.GroupNorm):
    """GroupNorm that is also accurate on a CPU in channels_last."""

    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _initialize(module: nn.Module) -> None:
    """DCGAN's initialization (Radford et al. 2016): N(0, 0.02), norms N(1, 0.02), zero biases."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)

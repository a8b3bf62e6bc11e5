"""Discriminators: networks that tell reconstructions from photos, patch by patch."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

__all__ = ["PatchDiscriminator"]

Norm = Literal["none", "group", "instance"]


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): 4x4 convolutions, LeakyReLU 0.2, weights from N(0, 0.02).

    Args:
        in_channels: image channels.
        channels: filters of the first layer; doubled per layer up to eight times.
        layers: strided layers; 3 gives 70-pixel patches.
        norm: normalization of the inner layers. Batch statistics are not offered: they leak between the samples of a batch
            and differ between ranks.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, layers: int = 3, norm: Norm = "group") -> None:
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for index in range(1, layers + 1):
            before, width = width, channels * min(2**index, 8)
            stride = 2 if index < layers else 1
            modules += [
                nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=norm == "none"),
                *_norm(norm, width),
                nn.LeakyReLU(0.2),
            ]
        modules.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*modules)
        self.minimum_size = 2 ** (layers + 1) + 2**layers  # smaller images leave no patch after the two stride-1 layers
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> logits [B, 1, h, w], one a patch."""
        return self.layers(x)


def _norm(norm: Norm, channels: int) -> list[nn.Module]:
    if norm == "group":
        return [nn.GroupNorm(min(32, channels // 4), channels)]
    return [nn.InstanceNorm2d(channels, affine=True)] if norm == "instance" else []


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.GroupNorm, nn.InstanceNorm2d)) and module.weight is not None:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)

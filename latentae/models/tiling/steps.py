"""The autoencoder as a list of steps, each of which runs on any part of an image.

Only GroupNorm connects distant pixels of a convolutional network. With a known scale and shift for
each channel, a step depends only on the pixels that its convolutions read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from latentae_kernels import conv3x3
from torch import Tensor, nn

from latentae.errors import ModelError
from latentae.models.autoencoder import AutoencoderKL, Coder, Decoder, Encoder
from latentae.models.blocks import Attention, Downsample, Level, MidBlock, ResnetBlock, Upsample
from latentae.models.layer_steps import is_plain_conv, is_unhooked, upsample_convolve

__all__ = [
    "Affine",
    "Convolution",
    "Norms",
    "Residual",
    "Step",
    "activate",
    "change",
    "check_layers",
    "convolve",
    "decoder_steps",
    "encoder_steps",
    "output_channels",
    "run",
    "scale_change",
    "split_decoder",
    "split_encoder",
]

Affine = tuple[Tensor, Tensor]
"""Scale and shift of each channel, [C] each: a GroupNorm with known statistics."""
Norms = Callable[[nn.GroupNorm, Tensor], Affine]
"""Gives a step its normalization: the layer and its input [B, C, H, W] -> scale and shift."""


@dataclass(frozen=True)
class Convolution:
    """One convolution, after GroupNorm and SiLU if it has a norm."""

    conv: nn.Conv2d
    norm: nn.GroupNorm | None = None
    kind: Literal["same", "down", "up"] = "same"
    """Whether height and width stay, are halved (padded right and bottom) or doubled."""


@dataclass(frozen=True)
class Residual:
    """Two convolutions around a skip."""

    first: Convolution
    second: Convolution
    shortcut: nn.Conv2d | None


Step = Convolution | Residual | Attention
_BLOCKS = (Encoder, Decoder, Level, MidBlock, ResnetBlock, Attention, Downsample, Upsample, nn.GroupNorm)


def check_layers(model: AutoencoderKL) -> None:
    """Check that tiling ignores no layer: its steps compute normalizations and skips themselves.

    Raises:
        ModelError: a block, normalization or convolution is replaced, or a block or normalization
            is hooked.
    """
    for name, module in model.named_modules():
        if name and (reason := _obstacle(module)) is not None:
            raise ModelError(
                f"tiling can't split this model: {name} {reason}; merge or remove it, or run untiled"
            )


def _obstacle(module: nn.Module) -> str | None:
    """Why tiling would ignore a module; None if it calls or computes it."""
    if isinstance(module, nn.ModuleList | nn.Linear):
        return None
    if isinstance(module, nn.Conv2d):  # steps call it if it is not plain
        return None if module.padding_mode == "zeros" else f"pads its input by {module.padding_mode!r} values"
    if type(module) not in _BLOCKS:
        return f"is a {type(module).__name__}"
    return None if is_unhooked(module) else "has hooks"


def encoder_steps(model: AutoencoderKL) -> list[Step]:
    """Image to moments."""
    steps = _coder_steps(model.encoder)
    return steps if model.quant_conv is None else [*steps, Convolution(model.quant_conv)]


def decoder_steps(model: AutoencoderKL) -> list[Step]:
    """Latent to image."""
    steps = _coder_steps(model.decoder)
    return steps if model.post_quant_conv is None else [Convolution(model.post_quant_conv), *steps]


def _coder_steps(coder: Coder) -> list[Step]:
    blocks = [block for chain in coder.chains() for block in chain.blocks()]  # pyright: ignore
    last = Convolution(coder.conv_out, coder.conv_norm_out)
    return [Convolution(coder.conv_in), *map(_block, blocks), last]


def _block(block: nn.Module) -> Step:
    if isinstance(block, ResnetBlock):
        first, second = Convolution(block.conv1, block.norm1), Convolution(block.conv2, block.norm2)
        return Residual(first, second, block.conv_shortcut)
    if isinstance(block, Downsample):
        return Convolution(block.conv, kind="down")
    if isinstance(block, Upsample):
        return Convolution(block.conv, kind="up")
    assert isinstance(block, Attention)
    return block


def split_decoder(steps: list[Step]) -> tuple[list[Step], list[Step]]:
    """Steps at the latent's resolution or up to the last attention, and those after them."""
    resampling = [index for index, step in enumerate(steps) if scale_change(step) != 1]
    attention = [index + 1 for index, step in enumerate(steps) if isinstance(step, Attention)]
    cut = max(resampling[:1] + attention + [1])
    return steps[:cut], steps[cut:]


def split_encoder(steps: list[Step]) -> tuple[list[Step], list[Step]]:
    """Steps down to the latent's resolution or to the first attention, and those after them."""
    resampling = [index + 1 for index, step in enumerate(steps) if scale_change(step) != 1]
    attention = [index for index, step in enumerate(steps) if isinstance(step, Attention)]
    before = [cut for cut in resampling if not attention or cut <= attention[0]]
    cut = before[-1] if before else 1
    return steps[:cut], steps[cut:]


def scale_change(step: Step) -> float:
    """Height after the step over height before it."""
    return {"same": 1, "down": 0.5, "up": 2}[step.kind] if isinstance(step, Convolution) else 1


def change(steps: list[Step]) -> float:
    """Height before the steps over height after them."""
    return 1 / math.prod(scale_change(step) for step in steps)


def output_channels(steps: list[Step]) -> int:
    """Channels after the last step."""
    last = steps[-1]
    assert not isinstance(last, Attention)
    return (last.second if isinstance(last, Residual) else last).conv.out_channels


def run(steps: list[Step], x: Tensor, norms: Norms) -> Tensor:
    """Run convolutional steps on a part of an image, [B, C, H, W], with zeros around it."""
    for step in steps:
        assert not isinstance(step, Attention)
        if isinstance(step, Convolution):
            x = _run_convolution(step, x, norms)
            continue
        h = _run_convolution(step.second, _run_convolution(step.first, x, norms), norms)
        x = h.add_(x if step.shortcut is None else step.shortcut(x))
    return x


def _run_convolution(step: Convolution, x: Tensor, norms: Norms) -> Tensor:
    return convolve(step, x if step.norm is None else activate(x, norms(step.norm, x)))


def activate(x: Tensor, affine: Affine, silu: bool = True) -> Tensor:
    """silu(scale x + shift) in a new tensor, computed in at least fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, shift = (value.to(wide).view(1, -1, 1, 1) for value in affine)
    y = torch.addcmul(shift, x.to(wide), scale)
    return (F.silu(y, inplace=True) if silu else y).to(x.dtype)


def convolve(step: Convolution, x: Tensor) -> Tensor:
    """The convolution without its normalization, on a part with zeros around it."""
    conv = step.conv
    if step.kind == "up":
        return upsample_convolve(conv, x).value()
    if step.kind == "down":
        return conv(F.pad(x, (0, 1, 0, 1)))
    return conv3x3(x, conv.weight, conv.bias) if is_plain_conv(conv) else conv(x)

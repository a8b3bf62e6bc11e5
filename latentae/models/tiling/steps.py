"""The autoencoder as a list of steps, and each step on a tensor whose normalizations are already known.

GroupNorm is all that ties distant pixels of a convolutional network together. Given its scale and shift for each channel, a step sees
no further than its convolutions do, so that it can run on any part of an image.
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
from latentae.models.pending import upsample_convolve
from latentae.models.plain import is_plain_conv, is_unhooked

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
    "halo",
    "output_channels",
    "run",
    "scale_change",
    "split_decoder",
    "split_encoder",
]

Affine = tuple[Tensor, Tensor]
"""Scale and shift of each channel, [C] each: GroupNorm whose statistics are known."""
Norms = Callable[[nn.GroupNorm, Tensor], Affine]
"""What gives a step its normalization: the layer and what it is about to read, [B, C, H, W], to scale and shift."""


@dataclass(frozen=True)
class Convolution:
    """One convolution, GroupNorm and SiLU before it where there is a norm."""

    conv: nn.Conv2d
    norm: nn.GroupNorm | None = None
    kind: Literal["same", "down", "up"] = "same"
    """Whether height and width stay, are halved (padded at the right and bottom only) or doubled before the convolution."""


@dataclass(frozen=True)
class Residual:
    """Two convolutions around a skip."""

    first: Convolution
    second: Convolution
    shortcut: nn.Conv2d | None


Step = Convolution | Residual | Attention
_KINDS = (
    Encoder,
    Decoder,
    Level,
    MidBlock,
    ResnetBlock,
    Attention,
    Downsample,
    Upsample,
    nn.GroupNorm,
)


def check_layers(model: AutoencoderKL) -> None:
    """Refuse a model with layers that tiling would ignore: its steps compute normalizations and skips themselves.

    Raises:
        ModelError: a block, normalization or convolution that is replaced, or a hooked block or normalization.
    """
    for name, module in model.named_modules():
        reason = _obstacle(module) if name else None
        if reason is not None:
            raise ModelError(
                f"tiling can't split this model: {name} {reason}; merge or remove it, or run untiled"
            )


def _obstacle(module: nn.Module) -> str | None:
    """Why tiling would ignore a module; None for those that it calls or computes itself."""
    if isinstance(module, nn.ModuleList | nn.Linear):
        return None
    if isinstance(module, nn.Conv2d):  # steps call it where it is not plain
        return None if module.padding_mode == "zeros" else f"pads its input by {module.padding_mode!r} values"
    if type(module) not in _KINDS:
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
    """What runs at the latent's resolution, or looks at the whole image (attention), and the convolutions after it."""
    resampling = [index for index, step in enumerate(steps) if scale_change(step) != 1]
    attention = [index + 1 for index, step in enumerate(steps) if isinstance(step, Attention)]
    cut = max(resampling[:1] + attention + [1])
    return steps[:cut], steps[cut:]


def split_encoder(steps: list[Step]) -> tuple[list[Step], list[Step]]:
    """The convolutions down to the latent's resolution, or to the first attention, and what comes after them."""
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


def halo(steps: list[Step], scale: float) -> int:
    """How many image pixels beyond its place a result can depend on; `scale` is image pixels per pixel of the first input."""
    reach = 0.0
    for step in steps:
        assert not isinstance(step, Attention)
        if isinstance(step, Residual):
            reach += scale * (step.first.conv.padding[0] + step.second.conv.padding[0])  # pyright: ignore[reportOperatorIssue]
            continue
        after = scale / scale_change(step)
        # a doubled pixel is as far as half of one before; a halving convolution reaches two pixels down and right
        reach += scale * 2 if step.kind == "down" else after * int(step.conv.padding[0])
        scale = after
    return int(-(-reach // 1))


def run(steps: list[Step], x: Tensor, norms: Norms) -> Tensor:
    """Convolutional steps on a part of an image, [B, C, H, W], padded by zeros at its edges."""
    for step in steps:
        assert not isinstance(step, Attention)
        if isinstance(step, Convolution):
            x = _convolution(step, x, norms)
            continue
        h = _convolution(step.second, _convolution(step.first, x, norms), norms)
        x = h.add_(x if step.shortcut is None else step.shortcut(x))
    return x


def _convolution(step: Convolution, x: Tensor, norms: Norms) -> Tensor:
    return convolve(step, x if step.norm is None else activate(x, norms(step.norm, x)))


def activate(x: Tensor, affine: Affine, silu: bool = True) -> Tensor:
    """silu(scale x + shift) in a new tensor; half precision is widened on the way."""
    scale, shift = (
        value.to(torch.promote_types(x.dtype, torch.float32)).view(1, -1, 1, 1) for value in affine
    )
    y = torch.addcmul(shift, x.to(scale.dtype), scale)
    return (F.silu(y, inplace=True) if silu else y).to(x.dtype)


def convolve(step: Convolution, x: Tensor) -> Tensor:
    """The convolution alone, of a part with zeros around it."""
    conv = step.conv
    if step.kind == "up":
        return upsample_convolve(conv, x).value()
    if step.kind == "down":
        return conv(F.pad(x, (0, 1, 0, 1)))
    return conv3x3(x, conv.weight, conv.bias) if is_plain_conv(conv) else conv(x)

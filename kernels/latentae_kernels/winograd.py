"""3x3 convolutions of a CPU's inference by Winograd's minimal filtering, with the normalization before them taken in.

A tile of 4x4 outputs needs 6x6 inputs and, once both are transformed, 36 multiplications for each pair of channels instead of 144
(Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks"). Where the native convolution already runs near the processor's
peak this is what is left to gain. Accuracy depends on the points at which the polynomials behind the transforms are evaluated: at 0,
±5/8, ±3/2 and infinity the root mean square error in fp32 is 1.6 to 1.8 times that of the native convolution (against fp64, at 128 and
512 channels); with ±1 and ±2 instead it is 3.7 times. A NaN or an infinity in the input spoils the 4x4 outputs of each tile that reads it.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_choice
from .cpu_strips import check_convolution, empty_output, is_plain_memory
from .group_norm import channel_moments, group_moments
from .norm_act import Act, check_norm_act, norm_act
from .winograd_strips import TILE, Strips, convolve_strips

__all__ = ["Norm", "conv3x3"]

Method = Literal["auto", "native", "winograd"]

# Where the method is faster was measured in fp32 with channels last, on processors with what torch calls AVX2 (wider vectors make the
# products cheaper beside the transforms). From these sizes on it won in every case.
_MEASURED = "AVX2"
_FEWEST_CHANNELS = 128
_FEWEST_TILES = 32
_FEWEST_PRODUCTS = 2**22  # tiles times pairs of channels


class Norm(NamedTuple):
    """GroupNorm and activation before a convolution: the arguments of `norm_act`."""

    weight: Tensor  # [C]
    bias: Tensor  # [C]
    groups: int
    eps: float = 1e-6
    act: Act = "silu"


def conv3x3(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [C_out, C, 3, 3]
    bias: Tensor | None = None,  # [C_out]
    norm: Norm | None = None,
    overwrite: bool = False,
    method: Method = "auto",
) -> Tensor:
    """A 3x3 convolution of stride 1 and padding 1, of `norm_act(x, *norm)` where a norm is given.

    Args:
        x: activations.
        weight, bias: as for `F.conv2d`.
        norm: normalization and activation that come before.
        overwrite: the caller has no more use for `x`, so its memory may take the result.
        method: "native" (`norm_act` and `F.conv2d`), "winograd" (CPU, fp32 or fp64, no gradient), or "auto": Winograd's method for
            large enough fp32 inference on a CPU on which it was measured to be faster, else native.

    Returns:
        [N, C_out, H, W] in the memory format of `x`.

    Raises:
        ValueError: an argument of the wrong kind or shape, or "winograd" where it can't run; the message names it.
    """
    _check(x, weight, bias, norm, method)
    able = method != "native" and _can_run(x, weight, bias, norm)
    if not able or (method == "auto" and not _pays(x, weight)):
        if method == "winograd":
            raise ValueError(
                f"conv3x3: method='winograd' is for fp32 or fp64 on a CPU without gradients, x is {x.dtype} on {x.device}; "
                "run it in torch.no_grad(), or use method='auto'"
            )
        return F.conv2d(x if norm is None else norm_act(x, *norm, backend="torch"), weight, bias, padding=1)
    dense = x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous()
    reuse = overwrite and norm is not None and dense and x.shape[1] == weight.shape[0]
    out = x if reuse else empty_output(x, weight.shape[0], x.shape[2:])
    if out.numel():
        affine = None if norm is None else _affine(x, norm)
        silu = norm is not None and norm.act == "silu"
        convolve_strips(x, weight, bias, affine, silu, _strips(x.shape, weight.shape[0]), out)
    return out


def _pays(x: Tensor, weight: Tensor) -> bool:
    if x.dtype != torch.float32 or min(weight.shape[:2]) < _FEWEST_CHANNELS:
        return False
    samples, _, height, width = x.shape
    tiles = -(-height // TILE) * -(-width // TILE)
    if tiles * TILE * TILE > 1.1 * height * width:  # much of the last tiles lies outside
        return False
    tiles *= samples
    large = tiles >= _FEWEST_TILES and tiles * weight.shape[:2].numel() >= _FEWEST_PRODUCTS
    return large and x.is_contiguous(memory_format=torch.channels_last) and _capability() == _MEASURED


def _can_run(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None) -> bool:
    parameters = (weight, bias) if norm is None else (weight, bias, norm.weight, norm.bias)
    return x.dtype in (torch.float32, torch.float64) and is_plain_memory(x, *parameters)


@functools.cache
def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability() if torch.backends.mkl.is_available() else "no MKL"


def _strips(shape: torch.Size, out_channels: int) -> Strips:
    """About 2**16 values at each of a tile's 36 positions: 9 MiB, so that what one step hands to the next stays in the last cache."""
    samples, channels, height, width = shape
    block = min(out_channels, 256)
    down, across = -(-height // TILE), -(-width // TILE)
    tiles = max(64, 2**16 // max(channels, block))
    rows = max(1, min(down, tiles // across))
    return Strips(rows, max(1, min(samples, tiles // (rows * across))) if rows == down else 1, block)


def _affine(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, scale and shift [N, C] that make (x - mean) * scale + shift the GroupNorm of `x` (Wu & He 2018)."""
    mean, variance = group_moments(*channel_moments(x), norm.groups)
    mean, rstd = (
        t.repeat_interleave(x.shape[1] // norm.groups, 1) for t in (mean, (variance + norm.eps).rsqrt())
    )
    centre, scale = mean.to(x.dtype), rstd * norm.weight
    return centre, scale.to(x.dtype), (norm.bias + (centre - mean) * scale).to(x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, method: str) -> None:
    op = "conv3x3"
    check_choice(op, "method", method, ("auto", "native", "winograd"))
    check_convolution(op, x, weight, bias)
    if norm is not None:
        check_norm_act(x, norm.weight, norm.bias, norm.groups, norm.act, None, None)

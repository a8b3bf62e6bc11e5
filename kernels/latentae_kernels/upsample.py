"""Nearest-neighbor 2x upsampling and a 3x3 convolution, without the upsampled input.

Each pixel that a 3x3 window sees in the upsampled image is one of 2x2 pixels of the small one. So
each of the four phases of the output is a 2x2 convolution whose weights are sums of the 3x3
weights: 16 multiplications instead of 36. That is one transposed convolution with a 4x4 kernel and
stride 2, with exact gradients. In one dimension, with taps w0, w1, w2,

    s = w0 + w1 + w2,  d[p] = x[p] - x[p-1],
    y[2p]   = w0 x[p-1] + (w1 + w2) x[p] = s x[p] - w0 d[p],
    y[2p+1] = (w0 + w1) x[p] + w2 x[p+1] = s x[p] + w2 d[p+1],

and the right side has 3 products for 2 outputs: 9 instead of 36 in two dimensions. CPU inference
uses that form in strips.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import is_plain_memory
from .tensors import check_choice, check_convolution, empty_output, scratch

__all__ = ["upsample_conv2d"]

Method = Literal["auto", "plain", "folded", "differences"]

_FEWEST_CHANNELS = 128  # from here on products weigh more than the additions that save them
_FEWEST_PIXELS = 512
_FEWEST_PRODUCTS = 2**20
_STRIP = 2**19  # values of an activation in a strip, 2 MiB


def upsample_conv2d(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [C_out, C, 3, 3]
    bias: Tensor | None = None,  # [C_out]
    method: Method = "auto",
) -> Tensor:
    """`conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)`.

    Args:
        x: activations.
        weight, bias: as for `F.conv2d`.
        method: "plain" (the two operators above), "folded" (one transposed convolution),
            "differences" (fewest products: CPU, fp32 or fp64, no gradient), or "auto": on a CPU
            "differences" for large inference and "folded" otherwise in fp32 and fp64; "plain" in
            half precision, where rounding summed weights costs accuracy, on a GPU, and in an
            export.

    Returns:
        [N, C_out, 2H, 2W], in the memory format of `x`. All but "differences" are twice
        differentiable.

    Raises:
        ValueError: an invalid shape, dtype or choice, or "differences" where it cannot run.
    """
    check_convolution("upsample_conv2d", x, weight, bias)
    check_choice("upsample_conv2d", "method", method, ("auto", "plain", "folded", "differences"))
    if method == "differences" and not _can_difference(x, weight, bias):
        raise ValueError(
            f"upsample_conv2d: method='differences' is for fp32 or fp64 on a CPU without gradients, x is "
            f"{x.dtype} on {x.device}; run it in torch.no_grad(), or use method='auto'"
        )
    if method == "auto":
        method = _choose(x, weight, bias)
    if method == "differences":
        return _differences(x, weight, bias)
    if method == "folded" and not torch.compiler.is_exporting():
        return F.conv_transpose2d(x, _fold(weight), bias, stride=2, padding=1)
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def _choose(x: Tensor, weight: Tensor, bias: Tensor | None) -> Method:
    precise = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    if x.device.type != "cpu" or not precise or torch.compiler.is_exporting():
        return "plain"
    pixels, pairs = x.shape[2] * x.shape[3], weight.shape[:2].numel()
    # per sample
    large = min(weight.shape[:2]) >= _FEWEST_CHANNELS and pixels * pairs >= 4 * _FEWEST_PRODUCTS
    if large and _can_difference(x, weight, bias) and x.is_contiguous(memory_format=torch.channels_last):
        return "differences"
    pixels *= x.shape[0]  # folding weights costs as much as convolving a few hundred pixels
    return "folded" if pixels >= _FEWEST_PIXELS and pixels * pairs >= _FEWEST_PRODUCTS else "plain"


def _can_difference(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return x.dtype in (torch.float32, torch.float64) and is_plain_memory(x, weight, bias)


def _fold(weight: Tensor) -> Tensor:
    """[C_out, C, 3, 3] -> [C, C_out, 4, 4]; taps (w2, w1 + w2, w0 + w1, w0) along both sides."""
    out_channels, channels = weight.shape[:2]
    wide = torch.promote_types(weight.dtype, torch.float32)  # one rounding, of the sum
    side = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=wide, device=weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        taps = torch.mm(torch.kron(side, side), weight.to(wide).permute(2, 3, 0, 1).reshape(9, -1))
    return taps.view(4, 4, out_channels, channels).permute(3, 2, 0, 1).to(weight.dtype)


def _differences(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Sum of x and its differences between lines, columns and both, times their weights."""
    samples, channels, height, width = x.shape
    out_channels = weight.shape[0]
    out = empty_output(x, out_channels, (2 * height, 2 * width))
    if not out.numel():
        return out
    parts = _difference_weights(weight)
    rows = max(1, min(height, _STRIP // (width * channels)))
    source, target = x.permute(0, 2, 3, 1), out.permute(0, 2, 3, 1)
    for n in range(samples):
        for row in range(0, height, rows):
            stop = min(row + rows, height)
            _difference_strip(source[n], row, stop, parts, bias, target[n, 2 * row : 2 * stop])
    return out


def _difference_weights(weight: Tensor) -> list[Tensor]:
    """[o, c, 3, 3] -> six matrices, from s = w0 + w1 + w2 and pair = (-w0, w2).

    s s, -w0 s and w2 s are [c, o]; s pair, -w0 pair and w2 pair are [c, 2 o].
    """
    out_channels, channels = weight.shape[:2]
    side = torch.tensor([[-1, 0, 0], [1, 1, 1], [0, 0, 1]], dtype=weight.dtype, device="cpu")  # -w0, s, w2
    both = torch.kron(side, side)[[4, 1, 7, 3, 5, 0, 2, 6, 8]]
    taps = weight.detach().permute(2, 3, 0, 1).reshape(9, -1)
    memory = scratch("weight", 9 * out_channels * channels, weight.dtype)
    summed = torch.mm(both, taps, out=memory.view(9, -1)).view(9 * out_channels, channels)
    return [part.t() for part in summed.split([out_channels * k for k in (1, 1, 1, 2, 2, 2)])]


def _difference_strip(
    source: Tensor,  # [H, W, c]
    row: int,
    stop: int,
    parts: list[Tensor],
    bias: Tensor | None,
    target: Tensor,  # [2 (stop - row), 2 W, o]
) -> None:
    height, width, channels = source.shape
    rows, size, out_channels, dtype = stop - row, (stop - row) * width, target.shape[2], source.dtype
    lines = scratch("lines", (rows + 2) * width * channels, dtype).view(-1, width, channels)
    if row == 0 or stop == height or not source.is_contiguous():
        first, end = max(row - 1, 0), min(stop + 1, height)
        lines[0].zero_()
        lines[-1].zero_()
        lines[first - row + 1 : end - row + 1].copy_(source[first:end])
    else:
        lines = source[row - 1 : stop + 1]
    down = scratch("down", (rows + 1) * width * channels, dtype).view(-1, width, channels)
    torch.sub(lines[1:], lines[:-1], out=down)
    across = _between_columns(lines[1:-1], "across")
    diagonal = _between_columns(down, "diagonal")
    middle = lines[1:-1].view(size, channels)
    base = torch.mm(middle, parts[0], out=scratch("base", size * out_channels, dtype).view(size, -1))
    if bias is not None:
        base += bias
    long = rows * (width + 1)
    memory = {
        name: scratch(name, 2 * long * out_channels, dtype).view(long, -1) for name in ("sides", "rest")
    }
    sides = torch.mm(across.view(long, -1), parts[3], out=memory["sides"])
    column = scratch("column", size * out_channels, dtype).view(size, -1)
    for phase in (0, 1):  # even lines of the output, then odd ones
        even = down[phase : phase + rows].view(size, channels)
        torch.addmm(base, even, parts[1 + phase], out=column)
        shifted = diagonal[phase : phase + rows].view(long, channels)
        rest = torch.addmm(sides, shifted, parts[4 + phase], out=memory["rest"])
        # the even column q of the output reads the first half of `rest` at q, the odd one the
        # second half at q + 1
        strides = ((width + 1) * 2 * out_channels, 2 * out_channels, 3 * out_channels, 1)
        pairs = rest.as_strided((rows, width, 2, out_channels), strides, rest.storage_offset())
        columns = column.view(rows, width, 1, out_channels)
        torch.add(columns, pairs, out=target[phase::2].unflatten(1, (width, 2)))


def _between_columns(lines: Tensor, name: str) -> Tensor:
    """[lines, W, c] -> [lines, W + 1, c]: differences to the column before, zero outside."""
    count, width, channels = lines.shape
    out = scratch(name, count * (width + 1) * channels, lines.dtype).view(count, width + 1, channels)
    torch.sub(lines[:, 1:], lines[:, :-1], out=out[:, 1:-1])
    out[:, 0] = lines[:, 0]
    torch.neg(lines[:, -1], out=out[:, -1])
    return out

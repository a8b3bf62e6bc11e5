"""3x3 convolutions for CPU inference by Winograd's minimal filtering, fused with the normalization
before them.

A tile of 4x4 outputs needs 6x6 inputs. Once both are transformed, each pair of channels takes 36
multiplications instead of 144 (Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural
Networks"). Along one dimension, six inputs d and three weights g give four outputs A^T[(G g) * (B^T
d)]; in two dimensions each matrix acts on rows and on columns. All three transforms are small
matrix products, and the products over channels are one batched matrix product for the 36 positions
of a tile. The image is processed in strips of tile rows, so that the transforms stay in the cache.

Accuracy depends on the points at which the polynomials behind the transforms are evaluated. At 0,
±5/8, ±3/2 and infinity the fp32 root mean square error is 1.6 to 1.8 times that of the native
convolution (against fp64, at 128 and 512 channels); at ±1 and ±2 it is 3.7 times. A NaN or an
infinity in the input spoils all 4x4 outputs of its tiles.

Shapes: c and o are input and output channels, i and j a tile's rows and columns, t all tiles of a
strip.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import is_plain_memory
from .norm_act import Norm, check_norm_act, norm_act
from .norm_act.group_norm import channel_moments, group_moments
from .tensors import check_choice, check_convolution, empty_output, scratch

__all__ = ["conv3x3"]

Method = Literal["auto", "native", "winograd"]

TILE = 4  # outputs of a tile along one side; it reads TILE + 2 inputs

# "auto" uses the method on what torch calls AVX2 processors, in fp32 and channels_last. From these
# sizes on it was faster in every measured case (docs/decisions/0022-winograd.md).
_MEASURED = "AVX2"
_FEWEST_CHANNELS = 128
_FEWEST_TILES = 32
_FEWEST_PRODUCTS = 2**22  # tiles times pairs of channels


class Strips(NamedTuple):
    """How a convolution is divided."""

    rows: int  # rows of tiles in a strip
    samples: int  # samples in a strip; above one only if a strip holds complete samples
    block: int  # output channels computed together


def conv3x3(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [C_out, C, 3, 3]
    bias: Tensor | None = None,  # [C_out]
    norm: Norm | None = None,
    overwrite: bool = False,
    method: Method = "auto",
) -> Tensor:
    """A 3x3 convolution of stride 1 and padding 1, of `norm_act(x, *norm)` if a norm is given.

    Args:
        x: activations.
        weight, bias: as for `F.conv2d`.
        norm: normalization and activation before the convolution.
        overwrite: `x` is not used again, so its memory may receive the result.
        method: "native" (`norm_act` and `F.conv2d`), "winograd" (CPU, fp32 or fp64, no gradient),
            or "auto": "winograd" for large fp32 inference on a CPU where it was measured to be
            faster, else "native".

    Returns:
        [N, C_out, H, W] in the memory format of `x`.

    Raises:
        ValueError: an invalid shape, dtype or choice, or "winograd" where it cannot run; the
            message names it.
    """
    check_choice("conv3x3", "method", method, ("auto", "native", "winograd"))
    check_convolution("conv3x3", x, weight, bias)
    if norm is not None:
        check_norm_act(x, norm.weight, norm.bias, norm.groups, norm.act)
    able = method != "native" and _can_run(x, weight, bias, norm)
    if not able or (method == "auto" and not _pays(x, weight)):
        if method == "winograd":
            raise ValueError(
                "conv3x3: method='winograd' is for fp32 or fp64 on a CPU without gradients, x is "
                f"{x.dtype} on {x.device}; run it in torch.no_grad(), or use method='auto'"
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
    if tiles * TILE * TILE > 1.1 * height * width:  # much of the last tiles is outside the image
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
    """About 2**16 values at each of 36 positions: 9 MiB, so that results stay in the cache."""
    samples, channels, height, width = shape
    block = min(out_channels, 256)
    down, across = -(-height // TILE), -(-width // TILE)
    tiles = max(64, 2**16 // max(channels, block))
    rows = max(1, min(down, tiles // across))
    return Strips(rows, max(1, min(samples, tiles // (rows * across))) if rows == down else 1, block)


def _affine(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """[N, C] each: (x - mean) * scale + shift is the GroupNorm of `x` (Wu & He 2018)."""
    mean, variance = group_moments(*channel_moments(x), norm.groups)
    rstd = (variance + norm.eps).rsqrt()
    mean, rstd = (t.repeat_interleave(x.shape[1] // norm.groups, 1) for t in (mean, rstd))
    center, scale = mean.to(x.dtype), rstd * norm.weight
    return center, scale.to(x.dtype), (norm.bias + (center - mean) * scale).to(x.dtype)


def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """B^T, G and A^T of Toom and Cook's method at the points 0, ±a, ±b and infinity (Blahut 2010,
    ch. 5).

    B^T has the coefficients of prod_{q != p} (x - q) over the finite points, G divides by their
    values prod_{q != p} (p - q), A^T has the powers of the points. a = 5/8 and b = 3/2 had the
    least error of all pairs of sixteenths; B^T and A^T are exact in fp32.
    """
    a, b = 5 / 8, 3 / 2
    aa, bb = a * a, b * b
    bt = [
        [aa * bb, 0, -aa - bb, 0, 1, 0],
        [0, -a * bb, -bb, a, 1, 0],
        [0, a * bb, -bb, -a, 1, 0],
        [0, -b * aa, -aa, b, 1, 0],
        [0, b * aa, -aa, -b, 1, 0],
        [0, aa * bb, 0, -aa - bb, 0, 1],
    ]
    at_a, at_b = 2 * aa * (aa - bb), 2 * bb * (bb - aa)
    g = [
        [1 / (aa * bb), 0, 0],
        [1 / at_a, a / at_a, aa / at_a],
        [1 / at_a, -a / at_a, aa / at_a],
        [1 / at_b, b / at_b, bb / at_b],
        [1 / at_b, -b / at_b, bb / at_b],
        [0, 0, 1],
    ]
    powers = [[x**k for x in (a, -a, b, -b)] for k in range(TILE)]
    at = [[float(k == 0), *row, float(k == TILE - 1)] for k, row in enumerate(powers)]
    return tuple(torch.tensor(m, dtype=torch.float64, device="cpu") for m in (bt, g, at))  # pyright: ignore[reportReturnType]


_BT, _G, _AT = _matrices()
# both transforms of a weight at once, [36, 9]: positions in the order (j, i) of the data, weights
# in (row, column)
_GG = torch.kron(_G, _G).view(6, 6, 9).transpose(0, 1).reshape(36, 9)


def convolve_strips(
    x: Tensor,  # [N, c, H, W]
    weight: Tensor,  # [o, c, 3, 3]
    bias: Tensor | None,  # [o]
    affine: tuple[Tensor, Tensor, Tensor] | None,  # mean, scale and shift, [N, c] each
    silu: bool,
    strips: Strips,
    out: Tensor,  # [N, o, H, W]; with `affine` it may be x itself
) -> None:
    """Convolve silu((x - mean) * scale + shift), or x itself, with padding 1 into `out`."""
    samples, channels, height, width = x.shape
    source, target = x.permute(0, 2, 3, 1), out.permute(0, 2, 3, 1)
    down, across = -(-height // TILE), -(-width // TILE)
    tiles = strips.samples * strips.rows * across
    wide = max(channels, min(strips.block, weight.shape[0]))
    # each step reads one buffer and writes the other
    first = scratch("first", 36 * tiles * wide, x.dtype)
    second = scratch("second", max(36 * tiles * wide, (24 * strips.rows * across + 5) * channels), x.dtype)
    blocks = _transform_weight(weight, strips.block)
    band = scratch("band", (TILE * strips.rows + 2) * width * channels, x.dtype).view(-1, width, channels)
    for n in range(0, samples, strips.samples):
        part = slice(n, min(n + strips.samples, samples))
        for row in range(0, down, strips.rows):
            rows = min(strips.rows, down - row)
            shape = (6, 6, part.stop - n, rows, across, channels)
            gathered = first[: torch.Size(shape).numel()].view(shape)
            for k in range(n, part.stop):
                affine_k = None if affine is None else tuple(t[k] for t in affine)
                lines = _lines(source[k], row, rows, band, affine_k, silu)
                _transform_rows(lines, gathered[:, :, k - n], second)
            _clear_outside(gathered, width)
            data = second[: gathered.numel()].view(6, -1)
            torch.mm(_BT.to(x.dtype), gathered.view(6, -1), out=data)
            data, here = data.view(36, -1, channels), target[part, TILE * row : TILE * (row + rows)]
            for index, transformed in enumerate(blocks):
                block = slice(index * strips.block, index * strips.block + transformed.shape[2])
                result = _multiply(data, transformed, first, second if len(blocks) == 1 else None)
                _store(result, here[..., block], None if bias is None else bias[block], rows)


def _transform_weight(weight: Tensor, block: int) -> list[Tensor]:
    """[o, c, 3, 3] -> for each block of output channels [36, c, o]."""
    out_channels = weight.shape[0]
    # a view where the weight is channels_last
    taps = weight.detach().permute(0, 2, 3, 1).reshape(out_channels, 9, -1)
    memory = scratch("weight", 4 * taps.numel(), weight.dtype).view(out_channels, 36, -1)
    matrix = _GG.to(weight.dtype).expand(out_channels, 36, 9)
    return [u.permute(1, 2, 0) for u in torch.bmm(matrix, taps, out=memory).split(block)]


def _lines(
    sample: Tensor,  # [H, W, c]
    row: int,
    rows: int,
    band: Tensor,  # [4 * rows of a strip + 2, W, c]
    affine: tuple[Tensor, ...] | None,  # mean, scale and shift, [c] each
    silu: bool,
) -> Tensor:
    """The 4 * rows + 2 lines of pixels that a strip reads, dense, zero outside the sample."""
    height, start = sample.shape[0], TILE * row - 1
    stop = start + TILE * rows + 2
    if affine is None and start >= 0 and stop <= height and sample.is_contiguous():
        return sample[start:stop]
    lines = band[: stop - start]
    inside = min(stop, height) - start
    if affine is not None and row:
        # the strip before has left them: they are not activated twice, and `out` may be x
        lines[:2].copy_(band[-2:])
        ready = 2
    else:
        ready = max(-start, 0)
        lines[:ready].zero_()
    new = lines[ready:inside]
    if affine is None:
        new.copy_(sample[start + ready : start + inside])
    else:
        mean, scale, shift = affine
        torch.sub(sample[start + ready : start + inside], mean, out=new)
        torch.addcmul(shift, new, scale, out=new)
        if silu:
            F.silu(new, inplace=True)
    lines[inside:].zero_()
    return lines


def _transform_rows(lines: Tensor, gathered: Tensor, memory: Tensor) -> None:
    """B^T over each tile's rows, tiles side by side: `lines` -> [6 j, 6 i, rows, across, c]."""
    rows, across, channels = gathered.shape[2:]
    line = lines.shape[1] * channels
    windows = lines.as_strided((rows, 6, line), (TILE * line, line, 1))
    # one free pixel before and four after: a tile's outermost columns read across the line's ends;
    # cleared later
    transformed = memory[channels : channels + 6 * rows * line].view(rows, 6, line)
    torch.bmm(_BT.to(lines.dtype).expand(rows, 6, 6), windows, out=transformed)
    sizes, strides = (6, 6, rows, across, channels), (channels, line, 6 * line, TILE * channels, 1)
    gathered.copy_(memory.as_strided(sizes, strides, memory.storage_offset()))


def _clear_outside(gathered: Tensor, width: int) -> None:
    across = gathered.shape[4]
    gathered[0, :, :, :, 0].zero_()
    gathered[width + 1 - TILE * (across - 1) :, :, :, :, across - 1].zero_()


def _multiply(data: Tensor, weight: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    """[36, t, c] times [36, c, o], transformed back by A^T on both sides -> [4 j, 4 i, t, o].

    `second` contains `data`; it is None where later blocks of output channels still need it.
    """
    size = data.shape[1] * weight.shape[2]
    middle = scratch("third", 24 * size, data.dtype) if second is None else second[: 24 * size]
    back = _AT.to(data.dtype)
    products = torch.bmm(data, weight, out=first[: 36 * size].view(36, -1, weight.shape[2]))
    columns = torch.mm(back, products.view(6, -1), out=middle.view(TILE, -1))
    out = first[: 16 * size].view(TILE, TILE, -1)
    torch.bmm(back.expand(TILE, TILE, 6), columns.view(TILE, 6, -1), out=out)
    return out.view(TILE, TILE, -1, weight.shape[2])


def _store(result: Tensor, target: Tensor, bias: Tensor | None, rows: int) -> None:
    """Interleave outputs [4 j, 4 i, t, o] into `target` [n, lines, W, o], and add the bias."""
    samples, height, width, channels = target.shape
    result = result.view(TILE, TILE, samples, rows, -1, channels)
    if height % TILE == 0 and width % TILE == 0:
        tiles = target.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE)).permute(4, 2, 0, 1, 3, 5)
        pieces = [(tiles, result)]
    else:  # the last tiles extend beyond the image
        pieces = []
        for i in range(min(TILE, height)):
            for j in range(min(TILE, width)):
                piece = target[:, i::TILE, j::TILE]
                pieces.append((piece, result[j, i, :, : piece.shape[1], : piece.shape[2]]))
    for piece, values in pieces:
        if bias is None:
            piece.copy_(values)
        else:
            torch.add(values, bias, out=piece)

"""Winograd's F(4x4, 3x3) with native operators: strips of tile rows whose transforms stay in the processor's cache.

Along one dimension, six inputs d and three weights g give four outputs, A^T[(G g) * (B^T d)]; in two dimensions every matrix acts on rows
and on columns. All three transforms are small matrix products, which run faster than the additions they consist of, and the products
over channels between them are one batched matrix product for the 36 positions of a tile.

Shapes: c and o are input and output channels, i and j a tile's rows and columns, t all tiles of a strip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_strips import scratch

__all__ = ["Strips", "convolve_strips"]

TILE = 4  # outputs of a tile along one side; it reads TILE + 2 inputs


@dataclass(frozen=True)
class Strips:
    """How a convolution is divided."""

    rows: int
    """Rows of tiles in a strip."""
    samples: int
    """Samples in a strip; more than one only where a strip holds whole samples."""
    block: int
    """Output channels computed together."""


def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """B^T, G and A^T of Toom and Cook's method at the points 0, ±a, ±b and infinity (Blahut 2010, ch. 5).

    B^T holds the coefficients of prod_{q != p} (x - q) over the finite points, G divides by their values prod_{q != p} (p - q), A^T holds
    the powers of the points. a = 5/8 and b = 3/2 had the least error of all pairs of sixteenths; B^T and A^T are exact in fp32.
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
# both transforms of a weight at once, [36, 9]: positions ordered (j, i), as the data's are; weights ordered (row, column)
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
    """Write the convolution (padding 1) of silu((x - mean) * scale + shift), or of x itself, to `out`."""
    samples, channels, height, width = x.shape
    source, target = x.permute(0, 2, 3, 1), out.permute(0, 2, 3, 1)
    across = -(-width // TILE)
    tiles = strips.samples * strips.rows * across
    wide = max(channels, min(strips.block, weight.shape[0]))
    # each step reads one buffer and writes the other
    first = scratch("first", 36 * tiles * wide, x.dtype)
    second = scratch("second", max(36 * tiles * wide, (24 * strips.rows * across + 5) * channels), x.dtype)
    blocks = _transform_weight(weight, strips.block)
    band = scratch("band", (TILE * strips.rows + 2) * width * channels, x.dtype).view(-1, width, channels)
    for n in range(0, samples, strips.samples):
        part = slice(n, min(n + strips.samples, samples))
        for row in range(0, -(-height // TILE), strips.rows):
            rows = min(strips.rows, -(-height // TILE) - row)
            gathered = first[: 36 * (part.stop - n) * rows * across * channels].view(
                6, 6, part.stop - n, rows, across, channels
            )
            for k in range(n, part.stop):
                lines = _lines(
                    source[k], row, rows, band, None if affine is None else tuple(t[k] for t in affine), silu
                )
                _transform_rows(lines, gathered[:, :, k - n], second)
            _clear_outside(gathered, width)
            data = second[: gathered.numel()].view(6, -1)
            torch.mm(_BT.to(x.dtype), gathered.view(6, -1), out=data)
            here = target[part, TILE * row : TILE * (row + rows)]
            for index, transformed in enumerate(blocks):
                block = slice(index * strips.block, index * strips.block + transformed.shape[2])
                result = _multiply(
                    data.view(36, -1, channels), transformed, first, len(blocks) == 1 and second
                )
                _store(result, here[..., block], None if bias is None else bias[block], rows)


def _transform_weight(weight: Tensor, block: int) -> list[Tensor]:
    """[o, c, 3, 3] -> for each block of output channels [36, c, o]."""
    taps = (
        weight.detach().permute(0, 2, 3, 1).reshape(weight.shape[0], 9, -1)
    )  # a view where the weight is channels last
    memory = scratch("weight", 4 * taps.numel(), weight.dtype).view(weight.shape[0], 36, -1)
    matrix = _GG.to(weight.dtype).expand(weight.shape[0], 36, 9)
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
        lines[:2].copy_(
            band[-2:]
        )  # the strip before has left them: not activated twice, and safe if `out` is x
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
    """B^T over the rows of every tile, and the tiles' columns copied side by side: `lines` -> [6 j, 6 i, rows, across, c]."""
    rows, across, channels = gathered.shape[2:]
    line = lines.shape[1] * channels
    windows = lines.as_strided((rows, 6, line), (TILE * line, line, 1))
    # one pixel is kept free before, four after: a tile's outermost columns read across the line's ends, and are cleared later
    transformed = memory[channels : channels + 6 * rows * line].view(rows, 6, line)
    torch.bmm(_BT.to(lines.dtype).expand(rows, 6, 6), windows, out=transformed)
    sizes, strides = (6, 6, rows, across, channels), (channels, line, 6 * line, TILE * channels, 1)
    gathered.copy_(memory.as_strided(sizes, strides, memory.storage_offset()))


def _clear_outside(gathered: Tensor, width: int) -> None:
    across = gathered.shape[4]
    gathered[0, :, :, :, 0].zero_()
    gathered[width + 1 - TILE * (across - 1) :, :, :, :, across - 1].zero_()


def _multiply(data: Tensor, weight: Tensor, first: Tensor, second: Tensor | bool) -> Tensor:
    """[36, t, c] times [36, c, o], transformed back by A^T on both sides -> [4 j, 4 i, t, o]."""
    size = data.shape[1] * weight.shape[2]
    # with more blocks to come the data in `second` must stay
    middle = scratch("third", 24 * size, data.dtype) if isinstance(second, bool) else second[: 24 * size]
    back = _AT.to(data.dtype)
    products = torch.bmm(data, weight, out=first[: 36 * size].view(36, -1, weight.shape[2]))
    columns = torch.mm(back, products.view(6, -1), out=middle.view(TILE, -1))
    out = first[: 16 * size].view(TILE, TILE, -1)
    return torch.bmm(back.expand(TILE, TILE, 6), columns.view(TILE, 6, -1), out=out).view(
        TILE, TILE, -1, weight.shape[2]
    )


def _store(result: Tensor, target: Tensor, bias: Tensor | None, rows: int) -> None:
    """Interleave the tiles' outputs [4 j, 4 i, t, o] into `target` [n, lines, W, o], and add the bias."""
    samples, height, width, channels = target.shape
    result = result.view(TILE, TILE, samples, rows, -1, channels)
    if height % TILE == 0 and width % TILE == 0:
        whole = target.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE)).permute(4, 2, 0, 1, 3, 5)
        pieces = [(whole, result)]
    else:  # the last tiles reach over the edge
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

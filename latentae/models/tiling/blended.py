"""Convolutions on overlapping, blended tiles, with the normalizations of the full image.

Small crops from all over the image pass the steps together, and each normalization takes its
statistics from all of them. So the next layer reads almost its input for the full image, and only
the sampling error is left. A downscaled image would not do: it lacks the fine structure that later
layers respond to.

Samples can be, for example, brighter than the image. So crops are weighted until mean, square and
roughness of their weighted input equal those of the full input (a calibration estimator: Deville &
Särndal 1992).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentae.models.latent_statistics import Moments
from latentae.models.tiling.steps import Affine, Norms, Step, run
from latentae.models.tiling.strips import affine, moments_of

__all__ = ["Source", "Tiles", "blend", "estimate", "samples", "weights"]

Box = tuple[int, int, int, int]

UNUSED = 0.4
"""Share of an overlap, from the edge inward, in which a tile has no weight."""
CROPS = 8
"""A sample has 8 x 8 crops and as many pixels as a tile, ..."""
FEWEST_UNITS = 4
"""... but a crop has at least this many latent pixels a side; the outermost are not used."""
SHARE = 8
"""One image pixel in SHARE is in a sample, if the image is large enough for several samples."""
RIDGE = 0.3
LIGHTEST, HEAVIEST = 0.1, 10.0
"""Limits of a crop's weight."""


@dataclass(frozen=True)
class Source:
    """Input of a list of steps for a full image.

    Attributes:
        cut: top, left, height and width in image pixels -> the input there, [1, C, h, w].
        traits: [1, C', H', W'] that characterizes each part: the image or the latent.
        height, width: of the image.
        unit: all numbers of a box are multiples of this many image pixels.
    """

    cut: Callable[[int, int, int, int], Tensor]
    traits: Tensor
    height: int
    width: int
    unit: int

    def traits_at(self, box: Box) -> Tensor:
        """The part of the traits in a box."""
        scale = self.height // self.traits.shape[2]
        top, left, height, width = (value // scale for value in box)
        return self.traits[:, :, top : top + height, left : left + width]


@dataclass(frozen=True)
class Tiles:
    """Positions of tiles, in image pixels.

    Attributes:
        side: of the largest tile, a multiple of `unit`.
        overlap: of two neighbors, within half a unit.
        unit: every number is a multiple of it.
    """

    side: int
    overlap: int
    unit: int

    def along(self, length: int) -> tuple[list[int], int]:
        """Evenly spaced starts of the fewest tiles that cover a length, and their side."""
        if length <= self.side:
            return [0], length
        count = -(-(length - self.overlap) // (self.side - self.overlap))
        side = -(-(length + (count - 1) * self.overlap) // (count * self.unit)) * self.unit
        return [round((length - side) * i / (count - 1) / self.unit) * self.unit for i in range(count)], side


def blend(
    steps: list[Step],
    source: Source,
    add: Callable[[int, int, Tensor], None],
    norms: Norms,
    tiles: Tiles,
    scale: int,
) -> None:
    """Run convolutional steps on overlapping tiles.

    Args:
        steps: without attention.
        source: the input.
        add: adds a part to the output, given its top and left in pixels of the output.
        norms: the same for all tiles, or the tiles would not match.
        tiles: their positions.
        scale: image pixels per pixel of the output.
    """
    (rows, high), (columns, wide) = tiles.along(source.height), tiles.along(source.width)
    heights = weights([row // scale for row in rows], high // scale, source.height // scale)
    widths = weights([column // scale for column in columns], wide // scale, source.width // scale)
    for top, down in zip(rows, heights, strict=True):
        for left, across in zip(columns, widths, strict=True):
            out = run(steps, source.cut(top, left, high, wide), norms)
            out *= torch.outer(down, across).to(out)
            add(top // scale, left // scale, out)


def weights(starts: list[int], side: int, length: int) -> Tensor:
    """Weights [tiles, side] along one side: raised cosines that sum to 1 at every pixel.

    With equal normalizations two tiles differ only near their edges, where one reads zeros instead
    of its neighbor. So a tile has no weight in the outer parts of an overlap.
    """
    pixels = torch.arange(side, dtype=torch.float64) + 0.5
    total = torch.zeros(len(starts), length, dtype=torch.float64)
    for i, start in enumerate(starts):
        weight = torch.ones(side, dtype=torch.float64)
        for neighbor, inward in ((i - 1, pixels), (i + 1, side - pixels)):
            shared = side - abs(start - starts[neighbor]) if 0 <= neighbor < len(starts) else 0
            if shared > 0:
                rise = ((inward / shared - UNUSED) / (1 - 2 * UNUSED)).clamp(0, 1)
                weight *= torch.sin(0.5 * math.pi * rise).square()
        total[i, start : start + side] = weight
    total /= total.sum(0)
    return torch.stack([total[i, start : start + side] for i, start in enumerate(starts)])


def estimate(steps: list[Step], source: Source, tile: int) -> dict[nn.GroupNorm, Affine]:
    """Scale and shift of every normalization in `steps`, from samples of `tile` squared pixels."""
    target = _population(source.traits)
    moments: dict[nn.GroupNorm, Moments] = {}
    for boxes in samples(source.height, source.width, source.unit, tile):
        shares = _calibrated(torch.cat([_traits(source.traits_at(box)) for box in boxes]), target)
        batch = torch.cat([source.cut(*box) for box in boxes])
        run(steps, batch, _Pooled(moments, boxes, shares, source))
    return {norm: affine(norm, found) for norm, found in moments.items()}


def samples(height: int, width: int, unit: int, tile: int) -> Iterator[list[Box]]:
    """Boxes (top, left, height, width) of each sample: one in each cell of a grid.

    Args:
        height, width: of the image.
        unit: all numbers are multiples of it.
        tile: a sample has about `tile` squared pixels.
    """
    side = max(tile // CROPS // unit, FEWEST_UNITS) * unit
    high, wide = min(side, height), min(side, width)
    many = max(1, tile * tile // (high * wide))
    down = max(1, min(round((many * height / width) ** 0.5), height // high, many))
    across = max(1, min(many // down, width // wide))
    for k in range(max(1, height * width // (SHARE * down * across * high * wide))):
        # a sequence of any length that fills the square evenly (Roberts 2018, "R2")
        y, x = (0.5 + k * 0.7548776662) % 1, (0.5 + k * 0.5698402910) % 1
        rows = [_start(height, high, down, i, y, unit) for i in range(down)]
        columns = [_start(width, wide, across, j, x, unit) for j in range(across)]
        yield [(row, column, high, wide) for row in rows for column in columns]


def _start(length: int, size: int, cells: int, index: int, offset: float, unit: int) -> int:
    center = (index + offset) * length / cells
    return min(max(round((center - size / 2) / unit) * unit, 0), length - size)


class _Pooled:
    """Normalizations of one sample, from the moments of all samples up to this one."""

    def __init__(
        self, moments: dict[nn.GroupNorm, Moments], boxes: list[Box], weights: Tensor, source: Source
    ) -> None:
        self._moments, self._weights = moments, weights.tolist()
        self._inside = [_margins(box, source) for box in boxes]
        self._height = boxes[0][2]

    def __call__(self, norm: nn.GroupNorm, x: Tensor) -> Affine:
        moments = self._moments.get(norm, Moments.empty(x.shape[1]))
        scale = self._height // x.shape[2]
        for part, margins, weight in zip(x.split(1), self._inside, self._weights, strict=True):
            top, bottom, left, right = (margin // scale for margin in margins)
            inside = part[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]
            inside = inside.contiguous(memory_format=torch.channels_last)
            moments = moments.merge(moments_of(inside, weight))
        self._moments[norm] = moments
        return affine(norm, moments)


def _margins(box: Box, source: Source) -> tuple[int, int, int, int]:
    """Pixels at each side of a crop that are not used: there zeros are not the image's own."""
    top, left, height, width = box
    at_edge = top == 0, top + height == source.height, left == 0, left + width == source.width
    return tuple(0 if edge else source.unit for edge in at_edge)  # pyright: ignore[reportReturnType]


def _traits(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 3 C]: mean, mean square and mean step to the neighbors."""
    x = x.cpu().double()
    across = x.diff(dim=3).abs().mean((2, 3)) if x.shape[3] > 1 else x.new_zeros(x.shape[:2])
    down = x.diff(dim=2).abs().mean((2, 3)) if x.shape[2] > 1 else x.new_zeros(x.shape[:2])
    return torch.cat([x.mean((2, 3)), x.square().mean((2, 3)), across + down], 1)


def _population(x: Tensor) -> Tensor:
    """The traits [3 C] of the full input, by strips; steps between two strips are left out."""
    rows = max(2, 2**20 // x.shape[3])
    parts = [(_traits(strip), strip.shape[2]) for strip in x.split(rows, dim=2)]
    return sum(traits[0] * height for traits, height in parts) / x.shape[2]  # pyright: ignore


def _calibrated(traits: Tensor, target: Tensor) -> Tensor:
    """Weights [n] close to 1 that bring the mean of traits [n, p] close to the target [p]."""
    count, size = traits.shape
    center, spread = traits.mean(0), traits.std(0, correction=0) + 1e-12
    standard, missing = (traits - center) / spread, (target - center) / spread
    gram = standard.T @ standard / count + (RIDGE * size / count) * torch.eye(size, dtype=traits.dtype)
    found = (1 + standard @ torch.linalg.solve(gram, missing)).clamp(LIGHTEST, HEAVIEST)
    return found / found.mean()

"""Tiles of a chain of convolutions, blended into one map by weights that rise and fall smoothly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentae.models.tiling.statistics import Source
from latentae.models.tiling.steps import Norms, Step, run

__all__ = ["Tiles", "blend", "weights"]

UNUSED = 0.4
"""Share of an overlap, from the edge on, in which a tile counts for nothing."""


@dataclass(frozen=True)
class Tiles:
    """Where tiles lie, in image pixels.

    Attributes:
        side: of the largest tile, a multiple of `unit`.
        overlap: of two neighbours, give or take half a unit.
        unit: that every number is a multiple of.
    """

    side: int
    overlap: int
    unit: int

    def along(self, length: int) -> tuple[list[int], int]:
        """Where the fewest tiles that cover a length begin, evenly spread, and their side: no larger than it takes."""
        if length <= self.side:
            return [0], length
        count = -(-(length - self.overlap) // (self.side - self.overlap))
        side = -(-(length + (count - 1) * self.overlap) // (count * self.unit)) * self.unit
        return [round((length - side) * i / (count - 1) / self.unit) * self.unit for i in range(count)], side


def weights(starts: list[int], side: int, length: int) -> Tensor:
    """[tiles, side] along one side: raised cosines in the middle of each overlap that add up to 1 at every pixel.

    With the same normalizations two tiles agree but near their edges, where one sees zeros instead of its neighbour. So a tile counts
    for nothing in the outer parts of an overlap.
    """
    places = torch.arange(side, dtype=torch.float64) + 0.5
    whole = torch.zeros(len(starts), length, dtype=torch.float64)
    for i, start in enumerate(starts):
        weight = torch.ones(side, dtype=torch.float64)
        for neighbour, inward in ((i - 1, places), (i + 1, side - places)):
            if 0 <= neighbour < len(starts):
                shared = side - abs(start - starts[neighbour])
                if shared > 0:
                    rise = ((inward / shared - UNUSED) / (1 - 2 * UNUSED)).clamp(0, 1)
                    weight *= torch.sin(0.5 * math.pi * rise).square()
        whole[i, start : start + side] = weight
    whole /= whole.sum(0)
    return torch.stack([whole[i, start : start + side] for i, start in enumerate(starts)])


def blend(
    steps: list[Step],
    source: Source,
    add: Callable[[int, int, Tensor], None],
    norms: Norms,
    tiles: Tiles,
    scale: int,
) -> None:
    """Run a chain of convolutions on overlapping tiles.

    Args:
        steps: no attention among them.
        source: the input.
        add: takes top and left in pixels of the output, and what is to be added to it there.
        norms: the same for all tiles, or they would not fit together.
        tiles: where they are.
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

"""What every normalization of a chain of convolutions sees on a whole image, estimated from samples of it.

Small crops from all over the image go through the chain together, and each normalization takes its statistics from all of them at once:
so the next layer reads what it would read on the whole image, and no error is handed down but that of sampling. Crops near the real thing
matter more than the whole of it made small: downscaled, an image lacks the fine structure that later layers respond to.

Sampling errs where the crops are, say, brighter than the image. So crops are weighted: such that mean, square and roughness of the
weighted crops' input equal those of the whole input, which are cheap to know (a calibration estimator: Deville & Särndal 1992).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentae.models.tiling.maps import Moments, affine
from latentae.models.tiling.steps import Affine, Step, run

__all__ = ["Source", "estimate", "samples"]

Box = tuple[int, int, int, int]

CROPS = 8
"""A sample is as large as a tile: 8 x 8 crops,"""
FEWEST_UNITS = 4
"""but no crop is smaller than so many latent pixels a side, of which the outermost don't count."""
SHARE = 8
"""One image pixel in so many is in a sample, if the image has so many samples."""
RIDGE = 0.3
LIGHTEST, HEAVIEST = 0.1, 10.0
"""Limits of a crop's weight."""


@dataclass(frozen=True)
class Source:
    """Input of a chain of convolutions for a whole image, wherever it is kept.

    Attributes:
        cut: top, left, height and width in image pixels -> the input there, [1, C, h, w].
        traits: [1, C', H', W'] that says what a place looks like: the image or the latent.
        height, width: of the image.
        unit: image pixels that the sides of every box are multiples of.
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


def estimate(steps: list[Step], source: Source, tile: int) -> dict[nn.GroupNorm, Affine]:
    """Scale and shift of every normalization in `steps`; `tile` squared is how many image pixels are computed at a time."""
    target = _population(source.traits)
    moments: dict[nn.GroupNorm, Moments] = {}
    for boxes in samples(source.height, source.width, source.unit, tile):
        weights = _calibrated(torch.cat([_traits(source.traits_at(box)) for box in boxes]), target)
        batch = torch.cat([source.cut(*box) for box in boxes])
        run(steps, batch, _Pooled(moments, boxes, weights, source))
    return {norm: affine(norm, found.mean, found.variance) for norm, found in moments.items()}


def samples(height: int, width: int, unit: int, tile: int) -> Iterator[list[Box]]:
    """Boxes (top, left, height, width) of each sample: one in every cell of a grid, at another place of its cell in every sample.

    Args:
        height, width: of the image.
        unit: that all numbers are multiples of.
        tile: a sample has about `tile` squared pixels.
    """
    side = max(tile // CROPS // unit, FEWEST_UNITS) * unit
    high, wide = min(side, height), min(side, width)
    many = max(1, tile * tile // (high * wide))
    down = max(1, min(round((many * height / width) ** 0.5), height // high, many))
    across = max(1, min(many // down, width // wide))
    for k in range(max(1, height * width // (SHARE * down * across * high * wide))):
        # a sequence that fills the square evenly however long it is (Roberts 2018, "R2")
        y, x = (0.5 + k * 0.7548776662) % 1, (0.5 + k * 0.5698402910) % 1
        rows = [_place(height, high, down, i, y, unit) for i in range(down)]
        columns = [_place(width, wide, across, j, x, unit) for j in range(across)]
        yield [(row, column, high, wide) for row in rows for column in columns]


def _place(length: int, size: int, cells: int, index: int, offset: float, unit: int) -> int:
    centre = (index + offset) * length / cells
    return min(max(round((centre - size / 2) / unit) * unit, 0), length - size)


class _Pooled:
    """Normalizations of one sample: by the moments of all samples so far and this one."""

    def __init__(
        self, moments: dict[nn.GroupNorm, Moments], boxes: list[Box], weights: Tensor, source: Source
    ) -> None:
        self._moments, self._weights = moments, weights.tolist()
        self._inside = [_margins(box, source) for box in boxes]
        self._height = boxes[0][2]

    def __call__(self, norm: nn.GroupNorm, x: Tensor) -> Affine:
        moments = self._moments.setdefault(norm, Moments(x.shape[1]))
        scale = self._height // x.shape[2]
        for part, margins, weight in zip(x.split(1), self._inside, self._weights, strict=True):
            top, bottom, left, right = (margin // scale for margin in margins)
            inside = part[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]
            moments.add(inside.contiguous(memory_format=torch.channels_last), weight)
        return affine(norm, moments.mean, moments.variance)


def _margins(box: Box, source: Source) -> tuple[int, int, int, int]:
    """What is left out at each side of a crop, in image pixels: it was computed from zeros; at the image's own edges that is right."""
    top, left, height, width = box
    at_edge = top == 0, top + height == source.height, left == 0, left + width == source.width
    return tuple(0 if edge else source.unit for edge in at_edge)  # pyright: ignore[reportReturnType]


def _traits(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 3 C]: mean, mean square and mean step to the neighbours."""
    x = x.cpu().double()
    across = x.diff(dim=3).abs().mean((2, 3)) if x.shape[3] > 1 else x.new_zeros(x.shape[:2])
    down = x.diff(dim=2).abs().mean((2, 3)) if x.shape[2] > 1 else x.new_zeros(x.shape[:2])
    return torch.cat([x.mean((2, 3)), x.square().mean((2, 3)), across + down], 1)


def _population(x: Tensor) -> Tensor:
    """The traits [3 C] of the whole, by strips; steps between two strips are left out."""
    rows = max(2, 2**20 // x.shape[3])
    parts = [(_traits(strip), strip.shape[2]) for strip in x.split(rows, dim=2)]
    return sum(traits[0] * height for traits, height in parts) / x.shape[2]  # pyright: ignore


def _calibrated(traits: Tensor, target: Tensor) -> Tensor:
    """Weights [n] of samples with these traits [n, p], close to 1 each, whose weighted mean is close to the target [p]."""
    count, size = traits.shape
    centre, spread = traits.mean(0), traits.std(0, correction=0) + 1e-12
    standard, missing = (traits - centre) / spread, (target - centre) / spread
    gram = standard.T @ standard / count + (RIDGE * size / count) * torch.eye(size, dtype=traits.dtype)
    weights = 1 + standard @ torch.linalg.solve(gram, missing)
    weights = weights.clamp(LIGHTEST, HEAVIEST)
    return weights / weights.mean()

"""Patches of a sample of images, of any size, and linear maps of them.

A *map of patches* is a tensor [m, C, f, f]: m numbers of a patch of f x f pixels as inner products, or m patches to draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from latentae.models.pca import image_patches

__all__ = ["PatchSample", "blocks", "parts"]


class PatchSample:
    """Patches of batches of uint8 images [B, C, H, W] about their mean colour, on the scale of [-1, 1].

    Attributes:
        colour: fp64 [C], the mean of all pixels.
    """

    def __init__(self, images: Sequence[Tensor]) -> None:
        self.images = images
        total = torch.stack([batch.double().sum((0, 2, 3)) for batch in images]).sum(0)
        self.colour = total / sum(batch[:, 0].numel() for batch in images) / 127.5 - 1

    def moments(self, numbers: Tensor, others: Tensor | None = None) -> Tensor:
        """Second moments, fp64 [m, m], of `numbers` [m, C, f, f] of the patches; with `others` [n, C, f, f] those of both, [m, n]."""
        left = numbers.flatten(1).T
        right = left if others is None else others.flatten(1).T
        total, count = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64), 0
        for patches in self._patches(numbers.shape[-1], 4096 + 10 * left.shape[1]):
            held = patches @ left
            total += held.T @ (held if others is None else patches @ right)
            count += len(patches)
        return total / count

    def prediction(self, numbers: Tensor) -> Tensor:
        """[m, C, f, f]: the patches whose sum, weighted by `numbers` [m, C, f, f] of a patch, is nearest to it in the mean square."""
        flat = numbers.flatten(1)
        products, total = torch.zeros(len(flat), len(flat), dtype=torch.float64), torch.zeros_like(flat)
        for patches in self._patches(numbers.shape[-1], 4096 + 10 * len(flat)):
            held = patches @ flat.T
            products += held.T @ held
            total += held.T @ patches
        return (torch.linalg.pinv(products, hermitian=True) @ total).reshape(
            numbers.shape
        )  # a number may be constant

    def _patches(self, size: int, wanted: int) -> Iterator[Tensor]:
        """About `wanted` patches, spread evenly over the images: fp64 [n, C * size * size] at a time."""
        count = sum(batch[:, 0].numel() for batch in self.images) // size**2
        step, seen = max(1, count // wanted), 0
        colour = self.colour.repeat_interleave(size * size)
        for batch in self.images:
            found = image_patches(batch, size).flatten(0, 1)
            yield found[-seen % step :: step] / 127.5 - 1 - colour
            seen += len(found)


def blocks(numbers: Tensor) -> Tensor:
    """[m, C, f, f] -> [4m, C, 2f, 2f]: the numbers of each of four neighbouring patches, in the order of `pixel_unshuffle`."""
    m, channels, f, _ = numbers.shape
    out = numbers.new_zeros(m, 2, 2, channels, 2, f, 2, f)
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        out[:, y, x, :, y, :, x] = numbers
    return out.reshape(4 * m, channels, 2 * f, 2 * f)


def parts(numbers: Tensor, f: int) -> Tensor:
    """[m, C, F, F] -> [m, (F / f)^2, C, f, f]: squares of f pixels, row by row, which is `pixel_shuffle`'s order where there are four."""
    m, channels, size, _ = numbers.shape
    n = size // f
    return (
        numbers.reshape(m, channels, n, f, n, f).permute(0, 2, 4, 1, 3, 5).reshape(m, n * n, channels, f, f)
    )

"""Block DCT at the latent's size: the k coefficients per block that vary most over images.

Colors are rotated by an orthonormal luma/chroma transform, the DCT-II of three numbers: (R + G +
B)/sqrt 3, (R - B)/sqrt 2 and (R - 2G + B)/sqrt 6. Up to scale these are the features of Ohta,
Kanade & Sakai 1980. Alpha and gray stay unchanged. Then each f x f block of each channel gets the
orthonormal two-dimensional DCT-II (Ahmed, Natarajan & Rao 1974).

As with PCA, k coefficients per block are kept as floats. The rest are replaced by their mean over
the training images, which costs nothing. All transforms are orthonormal, so the error is the sum of
the dropped variances, and keeping the k largest is optimal. PCA is the best basis, so it is never
worse on the images that both were fitted on. The gap between the two shows how much PCA gains from
being fitted to such images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from latentae.errors import DataError
from latentae.measures.scores import rank
from latentae.models.pca import PATCH_ORIGIN, PatchBasis, image_patches

__all__ = ["BlockDCT", "DctVariances", "fit_dct"]


class BlockDCT(PatchBasis):
    """DCT coefficients of image blocks, largest variance first."""


class DctVariances:
    """Mean and variance of every DCT coefficient over the blocks of images, in one pass.

    Args:
        block: side of a block in pixels, f.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self.count = 0
        self._sums: tuple[Tensor, Tensor] | None = None  # of coefficients and of their squares, [C, f, f]

    def add(self, images: Tensor) -> None:
        """Count the blocks of uint8 images [B, C, H, W].

        Raises:
            ImageError: a side that `block` does not divide.
        """
        channels = images.shape[1]
        patches = image_patches(images, self.block).flatten(0, 1) - PATCH_ORIGIN
        blocks = patches.unflatten(1, (channels, self.block, self.block))
        cosines, colors = _cosines(self.block).to(blocks), _colors(channels).to(blocks)
        found = torch.einsum("kc,nchw->nkhw", colors, cosines @ blocks @ cosines.T)
        sums = found.sum(0), found.square().sum(0)
        self._sums = sums if self._sums is None else (self._sums[0] + sums[0], self._sums[1] + sums[1])
        self.count += len(found)

    def watch(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Count batches and pass them on, so that PCA and DCT share one pass over images."""
        for batch in batches:
            self.add(batch)
            yield batch

    def best(self, components: int) -> BlockDCT:
        """The coefficients of largest variance, at most C * f * f.

        Variances that differ by no more than their rounding error count as equal. Ties go to the
        earlier channel (luma before chroma), then to the lower vertical and the lower horizontal
        frequency.

        Raises:
            DataError: no block was counted.
        """
        if self._sums is None or not self.count:
            raise DataError(
                "the DCT was given 0 blocks and can't tell which coefficients vary; give it images"
            )
        mean, squares = (total / self.count for total in self._sums)
        variances, channels = (squares - mean.square()).clamp(min=0).flatten(), len(mean)
        # A coefficient sums 2 f + C products, and its square is summed over all blocks; the error
        # grows as a random walk
        terms = 2 * self.block + channels + self.count**0.5
        rounding = torch.finfo(torch.float64).eps * terms * float(squares.max())
        ranked = rank(-variances, relative=0.0, absolute=rounding)
        kept = torch.tensor(list(itertools.islice(ranked, components)))
        cosines, colors = _cosines(self.block).to(mean), _colors(channels).to(mean)
        mean_block = torch.einsum("kc,khw->chw", colors, cosines.T @ mean @ cosines)
        color, rest = kept // self.block**2, kept % self.block**2
        rows, columns = cosines[rest // self.block], cosines[rest % self.block]
        basis = torch.einsum("nc,ny,nx->cyxn", colors[color], rows, columns).flatten(0, 2)
        return BlockDCT(mean_block.flatten() + PATCH_ORIGIN, basis, variances[kept], self.block, self.count)


def fit_dct(images: Tensor | Iterable[Tensor], block: int, components: int) -> BlockDCT:
    """Fit a block DCT: keep the coefficients that vary most over images.

    Args:
        images: uint8 [N, C, H, W], or an iterable of such batches.
        block: side of a block; it divides H and W.
        components: number of coefficients per block, all channels together.

    Raises:
        DataError: no images.
        ImageError: a side that `block` does not divide.
    """
    variances = DctVariances(block)
    for batch in [images] if isinstance(images, Tensor) else images:
        variances.add(batch)
    return variances.best(components)


def _cosines(size: int) -> Tensor:
    """The orthonormal DCT-II, fp64 [n, n]: row u is c_u sqrt(2/n) cos(pi (2x + 1) u / 2n).

    c_0 is sqrt(1/2), every other c_u is 1.
    """
    position = torch.arange(size, dtype=torch.float64)
    table = torch.cos(math.pi / (2 * size) * (2 * position + 1) * position[:, None]) * math.sqrt(2 / size)
    table[0] *= math.sqrt(0.5)
    return table


def _colors(channels: int) -> Tensor:
    """Orthonormal color transform fp64 [C, C]: rotates RGB, leaves alpha and gray unchanged."""
    table = torch.eye(channels, dtype=torch.float64)
    if channels in (3, 4):
        table[:3, :3] = _cosines(3)
    return table

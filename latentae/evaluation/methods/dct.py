"""Block DCT at equal floats: the k coefficients of an f x f block that vary most over the training images, the same k for all blocks.

Colours are first turned by an orthonormal luma/chroma transform, the DCT-II of three numbers: (R + G + B)/sqrt 3, (R - B)/sqrt 2 and
(R - 2G + B)/sqrt 6, up to scale the features of Ohta, Kanade & Sakai 1980; alpha and gray stay as they are. Each channel then has the
orthonormal two-dimensional DCT-II (Ahmed, Natarajan & Rao 1974) of each f x f block. As with PCA, k coefficients of each block are kept as
floats and the others replaced by their mean over the training images, which costs nothing. Because everything is orthonormal, the error is
the sum of the variances left out: the k of largest variance are the best choice, and PCA, the best of all bases, is never worse on the
images that both were fitted on. What it shows is how much of PCA comes from having seen such images, and how much any transform does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from latentae.errors import DataError
from latentae.evaluation.methods.projection import Projection
from latentae.measures.ranking import rank
from latentae.models.pca import PATCH_ORIGIN, PatchBasis, image_patches

__all__ = ["BlockDCT", "Dct", "DctVariances", "fit_dct"]


class BlockDCT(PatchBasis):
    """DCT coefficients of image blocks, largest variance first."""


class Dct(Projection):
    """The DCT coefficients that vary most, as many as the latent has channels. Any number of channels and size of block."""

    name: str = "dct"
    label: str = "Block DCT with as many floats"


class DctVariances:
    """Mean and variance of every DCT coefficient over the blocks of images, summed in one pass; memory for one number a coefficient.

    Args:
        block: side of a block in pixels, f.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self.count = 0
        self._total: Tensor | None = None  # [C, f, f], of coefficients
        self._squares: Tensor | None = None

    def add(self, images: Tensor) -> None:
        """Count the blocks of uint8 images [B, C, H, W].

        Raises:
            ImageError: a side that `block` does not divide.
        """
        channels = images.shape[1]
        blocks = (image_patches(images, self.block).flatten(0, 1) - PATCH_ORIGIN).unflatten(
            1, (channels, self.block, self.block)
        )
        cosines, colours = _cosines(self.block).to(blocks), _colours(channels).to(blocks)
        found = torch.einsum("kc,nchw->nkhw", colours, cosines @ blocks @ cosines.T)
        total, squares = found.sum(0), found.square().sum(0)
        self._total = total if self._total is None else self._total + total
        self._squares = squares if self._squares is None else self._squares + squares
        self.count += len(found)

    def watch(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The batches as they are, counted in passing: so that one pass over training images serves PCA and the DCT."""
        for batch in batches:
            self.add(batch)
            yield batch

    def best(self, components: int) -> BlockDCT:
        """The coefficients of largest variance, at most C * f * f.

        Variances that differ by no more than their rounding error are equal. Of equal ones the earlier channel comes first (luma before
        chroma), then the lower vertical and the lower horizontal frequency.

        Raises:
            DataError: no block was counted.
        """
        if self._total is None or self._squares is None or not self.count:
            raise DataError(
                "the DCT was given 0 blocks and can't tell which coefficients vary; give it images"
            )
        mean = self._total / self.count
        squares = self._squares / self.count
        variances, channels = (squares - mean.square()).clamp(min=0).flatten(), len(mean)
        # A coefficient sums 2 f + C products, and its square is summed over all blocks; long sums err as a random walk does.
        rounding = (
            torch.finfo(torch.float64).eps
            * (2 * self.block + channels + self.count**0.5)
            * float(squares.max())
        )
        kept = torch.tensor(
            list(itertools.islice(rank(-variances, relative=0.0, absolute=rounding), components))
        )
        cosines, colours = _cosines(self.block).to(mean), _colours(channels).to(mean)
        mean_block = torch.einsum("kc,khw->chw", colours, cosines.T @ mean @ cosines)
        colour, rest = kept // self.block**2, kept % self.block**2
        rows, columns = cosines[rest // self.block], cosines[rest % self.block]
        basis = torch.einsum("nc,ny,nx->cyxn", colours[colour], rows, columns).flatten(0, 2)
        return BlockDCT(mean_block.flatten() + PATCH_ORIGIN, basis, variances[kept], self.block, self.count)


def fit_dct(images: Tensor | Iterable[Tensor], block: int, components: int) -> BlockDCT:
    """The DCT coefficients of block x block pixels that vary most over images.

    Args:
        images: uint8 [N, C, H, W], or an iterable of such batches (memory does not grow with their number).
        block: side of a block; it divides H and W.
        components: how many coefficients to keep of each block, all channels together.

    Raises:
        DataError: no images.
        ImageError: a side that `block` does not divide.
    """
    variances = DctVariances(block)
    for batch in [images] if isinstance(images, Tensor) else images:
        variances.add(batch)
    return variances.best(components)


def _cosines(size: int) -> Tensor:
    """The orthonormal DCT-II, fp64 [size, size]: row u has c_u sqrt(2/n) cos(pi (2x + 1) u / 2n), c_0 = sqrt(1/2)."""
    position = torch.arange(size, dtype=torch.float64)
    table = torch.cos(math.pi / (2 * size) * (2 * position + 1) * position[:, None]) * math.sqrt(2 / size)
    table[0] *= math.sqrt(0.5)
    return table


def _colours(channels: int) -> Tensor:
    """The orthonormal colour transform, fp64 [C, C]: the first three channels of RGB and RGBA are turned, all else is left."""
    table = torch.eye(channels, dtype=torch.float64)
    if channels in (3, 4):
        table[:3, :3] = _cosines(3)
    return table

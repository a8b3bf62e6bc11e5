"""Principal components of image patches: the best linear autoencoder (Baldi & Hornik 1989).

`fit_pca` sums the covariance: exact and independent of the order of images. It takes d^2 memory and
d^3 time for patches of d numbers. `sketch_pca` keeps the leading directions of the patches so far,
with memory for a few times `components` patches. On the photos of scikit-image its reconstructions
are within 0.001 dB of the exact ones, even for images sorted by brightness (16 x 16 patches with 32
components, 32 x 32 with 64). A random sketch of the covariance of the same size loses 0.2 dB there,
and randomized subspace iteration needs three passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.errors import DataError, ImageError

__all__ = [
    "MAX_PATCH_NUMBERS",
    "PATCH_ORIGIN",
    "PatchBasis",
    "PatchPCA",
    "fit_pca",
    "image_patches",
    "principal_angles",
    "sketch_pca",
]

MAX_PATCH_NUMBERS = 3 * 32 * 32
"""Limit of the closed form: the covariance takes 75 MB for f32 patches, 1.2 GB for f64."""
PATCHES_PER_COMPONENT = 20
"""Minimum for a sketch: it loses 0.25 dB on other photos; half as many lose 0.5 dB."""
PATCH_ORIGIN = 127.5
"""Origin of second moments: a fixed value near the mean keeps the subtraction of the mean exact."""


@dataclass(frozen=True)
class PatchBasis:
    """An orthonormal basis of patches: `components` floats per patch instead of C * patch * patch.

    Numbers of a patch are ordered [C, patch, patch], as in the weight of a convolution.

    Attributes:
        mean: fp64 [d], d = C * patch * patch, on the [0, 255] scale.
        basis: fp64 [d, k], orthonormal columns, largest variance first; signs follow a rule, not
            the processor.
        variances: fp64 [k], mean square of each component over the patches, on the [0, 255] scale.
        patch: side of a patch in pixels.
        patches: number of patches it was fitted on.
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor
    patch: int
    patches: int

    @property
    def channels(self) -> int:
        """Channels of the images it was fitted on."""
        return len(self.mean) // self.patch**2

    @property
    def components(self) -> int:
        """Floats per patch, k."""
        return self.basis.shape[1]

    def truncated(self, components: int) -> Self:
        """The leading `components` of it."""
        return replace(self, basis=self.basis[:, :components], variances=self.variances[:components])

    def encode(self, images: Tensor) -> Tensor:
        """Components of the patches of uint8 images [B, C, H, W]: fp64 [B, k, H / patch, W /
        patch].

        Raises:
            ImageError: a side that `patch` does not divide, or other channels than those it was
                fitted on.
        """
        if images.shape[1] != self.channels:
            raise ImageError(
                f"images have {images.shape[1]} channels, these components are of images with "
                f"{self.channels}; use others"
            )
        tokens = image_patches(images, self.patch)
        height, width = images.shape[2] // self.patch, images.shape[3] // self.patch
        found = (tokens - self.mean.to(tokens)) @ self.basis.to(tokens)
        return found.transpose(1, 2).unflatten(2, (height, width))

    def decode(self, components: Tensor) -> Tensor:
        """Images uint8 [B, C, H, W] from components [B, k, H / patch, W / patch]."""
        found = components.double().flatten(2).transpose(1, 2)
        tokens = self.mean.to(found) + found @ self.basis.to(found).T
        size = (components.shape[2] * self.patch, components.shape[3] * self.patch)
        folded = F.fold(tokens.transpose(1, 2), size, kernel_size=self.patch, stride=self.patch)
        return folded.round().clamp(0, 255).to(torch.uint8)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Project the patches of uint8 images [B, C, H, W] on the components and back to uint8.

        Raises:
            ImageError: a side that `patch` does not divide, or other channels than those it was
                fitted on.
        """
        return self.decode(self.encode(images))


class PatchPCA(PatchBasis):
    """Principal components: the basis with the smallest squared error on its own patches."""


def fit_pca(images: Tensor | Iterable[Tensor], patch: int, components: int) -> PatchPCA:
    """PCA of image patches in closed form: mean, fp64 covariance, eigenvectors.

    Args:
        images: uint8 [N, C, H, W], or an iterable of such batches (memory does not grow with their
            number).
        patch: side of a patch; it divides H and W.
        components: number to keep, at most C * patch * patch. z components of f x f patches have as
            many floats as the latent of a model with z channels and downsampling f.

    Raises:
        DataError: fewer patches than numbers in a patch.
        ImageError: a side that `patch` does not divide.
    """
    total, products, count = None, None, 0
    for batch in _batches(images):
        tokens = image_patches(batch, patch).flatten(0, 1) - PATCH_ORIGIN
        total = tokens.sum(0) if total is None else total + tokens.sum(0)
        products = tokens.T @ tokens if products is None else products + tokens.T @ tokens
        count += len(tokens)
    if total is None or products is None or count < len(total):
        raise _too_few(count, patch, 0 if total is None else len(total))
    mean = total / count
    values, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    variances, basis = values.flip(0)[:components].clamp(min=0), vectors.flip(1)[:, :components]
    return PatchPCA(mean + PATCH_ORIGIN, _signed(basis), variances, patch, count)


def sketch_pca(images: Tensor | Iterable[Tensor], patch: int, components: int) -> PatchPCA:
    """The leading principal components of patches whose covariance is too large, in one pass.

    Sequential Karhunen-Loeve (Ross, Lim, Lin & Yang 2008, "Incremental learning for robust visual
    tracking", sec. 3.1): each block of patches is stacked on the leading singular vectors of the
    blocks before it, and the SVD is truncated. Twice the wanted number are kept, so that a
    direction that starts faint is not lost. The mean is exact and nothing is random: equal images
    in equal order give equal components.

    Args:
        images: uint8 [N, C, H, W], or an iterable of such batches, best in mixed order. It is read
            once; the size of batches has no effect.
        patch: side of a patch; it divides H and W.
        components: number to keep, at most C * patch * patch; it needs 20 patches for each.

    Raises:
        DataError: too few patches.
        ImageError: a side that `patch` does not divide.
    """
    rank = 2 * components + 16
    mean, leading, count = None, None, 0  # `leading` [rank, d]: right singular vectors times singular values
    for block in _blocks(_batches(images), patch, 2 * rank):
        added, block_mean = len(block), block.mean(0)
        if mean is None or leading is None:
            mean, rows = block_mean, block - block_mean
        else:
            shift = (count * added / (count + added)) ** 0.5 * (mean - block_mean)
            rows = torch.cat([leading, block - block_mean, shift[None]])
            mean = mean + added / (count + added) * (block_mean - mean)
        count += added
        leading = _leading(rows, rank)
    if mean is None or leading is None or count < PATCHES_PER_COMPONENT * components:
        raise _too_few(count, patch, PATCHES_PER_COMPONENT * components)
    _, singular, vectors = torch.linalg.svd(leading, full_matrices=False)
    return PatchPCA(
        mean + PATCH_ORIGIN,
        _signed(vectors[:components].T),
        singular[:components].square() / count,
        patch,
        count,
    )


def image_patches(images: Tensor, patch: int) -> Tensor:
    """Split uint8 images [B, C, H, W] into patches: fp64 [B, patches, C * patch * patch].

    Raises:
        ImageError: a side that `patch` does not divide.
    """
    if images.shape[2] % patch or images.shape[3] % patch:
        height, width = images.shape[2:]
        raise ImageError(f"image is {height} x {width}, patches of {patch} need sides that {patch} divides")
    return F.unfold(images.double(), kernel_size=patch, stride=patch).transpose(1, 2)


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles between two subspaces in degrees, smallest first: fp64 [min(k, m)].

    They come from sines below 45 degrees and from cosines above, so that small angles keep their
    digits (Bjorck & Golub 1973, "Numerical methods for computing angles between linear subspaces",
    eq. 13 and 15).

    Args:
        a: [d, k], independent columns that span the first.
        b: [d, m], independent columns that span the second.
    """
    a, b = (torch.linalg.qr(basis.double())[0] for basis in (a, b))
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    products = a.T @ b
    cosines = torch.linalg.svdvals(products).clamp(max=1)
    sines = torch.linalg.svdvals(b - a @ products).flip(0).clamp(max=1)
    return torch.where(cosines > 0.5**0.5, sines.asin(), cosines.acos()).rad2deg()


def _leading(rows: Tensor, rank: int) -> Tensor:
    """The `rank` leading right singular vectors of rows [n, d], times their singular values."""
    vectors = torch.linalg.eigh(rows @ rows.T).eigenvectors
    return vectors.flip(1)[:, :rank].T @ rows


def _signed(basis: Tensor) -> Tensor:
    """Columns [d, k] with signs by a rule, because LAPACK's signs depend on the processor.

    The first number that is at least half as large as the column's largest is positive; the largest
    may not be unique.
    """
    sizes = basis.abs()
    first = (sizes >= 0.5 * sizes.amax(dim=0)).int().argmax(dim=0, keepdim=True)
    return basis * basis.gather(0, first).sign()


def _too_few(count: int, patch: int, needed: int) -> DataError:
    what = f"at least {needed} patches of {patch} x {patch} pixels" if count else "any"
    return DataError(f"PCA has {count} patches, it needs {what}; give it more images")


def _batches(images: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    return [images] if isinstance(images, Tensor) else images


def _blocks(batches: Iterable[Tensor], patch: int, size: int) -> Iterator[Tensor]:
    """The patches of all batches minus the origin, at most fp64 [size, d] at a time."""
    waiting: list[Tensor] = []
    for batch in batches:
        waiting.append(image_patches(batch, patch).flatten(0, 1) - PATCH_ORIGIN)
        if sum(map(len, waiting)) >= size:
            *full, rest = torch.cat(waiting).split(size)
            if len(rest) == size:
                full, rest = [*full, rest], rest[:0]
            yield from full
            waiting = [rest]
    rest = torch.cat(waiting) if waiting else torch.empty(0)
    if len(rest):
        yield rest

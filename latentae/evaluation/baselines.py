"""What a model must beat: PCA at equal latent floats, and JPEG at the bytes its quantised latents take.

Bytes of a latent. The posterior mean of one image, [z, h, w], is quantised to 8 bits a number, uniformly between the smallest
and the largest value of each of its channels; the codes, channel after channel, are deflated at level 9. The stream is 8 bytes
for each channel (minimum and step, little-endian fp32), then the deflated codes: all that is needed to decode, given the model
and the image size. zlib rather than lzma: on a few kilobytes of codes its header is smaller and its Huffman tables get as far.

Bytes of a JPEG. The whole file, with its headers and optimised Huffman tables, at the highest quality that fits into the budget,
with or without chroma subsampling, whichever is nearer to the image.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentae.errors import DataError, ImageError, ModelError

__all__ = ["MAX_PATCH_NUMBERS", "PatchPCA", "compress_latent", "decompress_latent", "fit_pca", "jpeg_within"]

MAX_PATCH_NUMBERS = 3 * 32 * 32  # the covariance of f32 patches takes 75 MB; of f64 patches 1.2 GB and minutes
LEVELS = 255
SUBSAMPLINGS = (0, 2)  # Pillow's names of 4:4:4 and 4:2:0


@dataclass(frozen=True)
class PatchPCA:
    """Principal components of image patches.

    Attributes:
        mean: fp64 [d], d = C * patch * patch, on the [0, 255] scale.
        basis: fp64 [d, k], orthonormal columns, largest variance first.
        patch: side of a patch in pixels.
        patches: how many patches it was fitted on.
    """

    mean: Tensor
    basis: Tensor
    patch: int
    patches: int

    def reconstruct(self, images: Tensor) -> Tensor:
        """Project the patches of uint8 images [B, C, H, W] onto the components and back; uint8, the same shape."""
        tokens = _patches(images, self.patch)
        mean, basis = self.mean.to(tokens), self.basis.to(tokens)
        projected = mean + ((tokens - mean) @ basis) @ basis.T
        folded = F.fold(projected.transpose(1, 2), images.shape[2:], kernel_size=self.patch, stride=self.patch)
        return folded.round().clamp(0, 255).to(torch.uint8)


def _patches(images: Tensor, patch: int) -> Tensor:
    """uint8 [B, C, H, W] -> fp64 [B, patches, C * patch * patch]."""
    if images.shape[2] % patch or images.shape[3] % patch:
        raise ImageError(f"image is {images.shape[2]} x {images.shape[3]}, patches of {patch} need sides that {patch} divides")
    return F.unfold(images.double(), kernel_size=patch, stride=patch).transpose(1, 2)


def fit_pca(images: Tensor | Iterable[Tensor], patch: int, components: int) -> PatchPCA:
    """PCA of the patch x patch patches of images, in closed form: mean, fp64 covariance, eigenvectors.

    Args:
        images: uint8 [N, C, H, W], or an iterable of such batches (memory does not grow with their number).
        patch: side of a patch; it divides H and W.
        components: how many to keep; a model with z channels and downsampling f keeps as many floats as z components
            of f x f patches. At most C * patch * patch.

    Raises:
        DataError: fewer patches than numbers in a patch.
    """
    batches = [images] if isinstance(images, Tensor) else images
    total, products, count, origin = None, None, 0, 127.5
    for batch in batches:
        tokens = _patches(batch, patch).flatten(0, 1) - origin  # a fixed origin near the mean keeps the subtraction below exact
        total = tokens.sum(0) if total is None else total + tokens.sum(0)
        products = tokens.T @ tokens if products is None else products + tokens.T @ tokens
        count += len(tokens)
    if total is None or products is None or count < len(total):
        needed = "any" if total is None else f"at least {len(total)} patches of {patch} x {patch} pixels"
        raise DataError(f"PCA was given {count} patches, it needs {needed}; give it more images")
    mean = total / count
    covariance = products / count - torch.outer(mean, mean)
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)
    return PatchPCA(mean + origin, vectors[:, :components].clone(), patch, count)


def compress_latent(latent: Tensor) -> bytes:
    """A latent [z, h, w] as the bytes described at the top of this module.

    Raises:
        ModelError: the latent is not finite.
    """
    if not torch.isfinite(latent).all():
        raise ModelError(
            "the latent has NaN or infinite values and can't be quantised; the model has diverged, use another checkpoint"
        )
    channels = latent.detach().cpu().float().flatten(1).numpy()
    low = channels.min(1, keepdims=True)
    step = ((channels.max(1, keepdims=True).astype(np.float64) - low) / LEVELS).astype(np.float32)
    codes = np.rint((channels.astype(np.float64) - low) / np.where(step > 0, step, 1)).clip(0, LEVELS).astype(np.uint8)
    return np.concatenate([low, step], axis=1).astype("<f4").tobytes() + zlib.compress(codes.tobytes(), 9)


def decompress_latent(data: bytes, shape: Sequence[int]) -> Tensor:
    """The latent fp32 [z, h, w] that `compress_latent` stored: minimum + step * code."""
    header = np.frombuffer(data[: 8 * shape[0]], dtype="<f4").reshape(shape[0], 2)
    codes = np.frombuffer(zlib.decompress(data[8 * shape[0] :]), dtype=np.uint8).reshape(shape[0], -1)
    values = header[:, :1] + header[:, 1:] * codes.astype(np.float32)
    return torch.from_numpy(values.astype(np.float32)).reshape(*shape)


@dataclass(frozen=True)
class Jpeg:
    """A JPEG file, its decoded image uint8 [3, H, W], quality (1 to 100) and Pillow's subsampling (0: 4:4:4, 2: 4:2:0)."""

    data: bytes
    image: Tensor
    quality: int
    subsampling: int


def jpeg_within(image: Tensor, budget: int) -> Jpeg | None:
    """The best JPEG of an image uint8 [3, H, W] in at most `budget` bytes; None when quality 1 is already larger.

    For each chroma subsampling, bisection finds the quality at which one step more no longer fits; the nearer to the image wins.
    """
    pixels = image.cpu().permute(1, 2, 0).contiguous().numpy()
    picture, best, smallest_error = Image.fromarray(pixels), None, np.inf
    for subsampling in SUBSAMPLINGS:
        found = _highest_quality(picture, subsampling, budget)
        if found is None:
            continue
        quality, data = found
        with Image.open(io.BytesIO(data)) as decoded:
            result = np.array(decoded.convert("RGB"))
        error = float(np.square(result.astype(np.float64) - pixels).mean())
        if error < smallest_error:
            best, smallest_error = Jpeg(data, torch.from_numpy(result).permute(2, 0, 1).contiguous(), quality, subsampling), error
    return best


def _highest_quality(picture: Image.Image, subsampling: int, budget: int) -> tuple[int, bytes] | None:
    low, high, best = 0, 101, b""  # quality `low` fits (or is 0), `high` does not (or is 101)
    while high - low > 1:
        quality = (low + high) // 2
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, subsampling=subsampling, optimize=True)
        if buffer.tell() <= budget:
            low, best = quality, buffer.getvalue()
        else:
            high = quality
    return (low, best) if best else None

"""What a model must beat beside PCA (latentae.models.pca): JPEG at the bytes its quantised latents take.

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
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentae.errors import ModelError

__all__ = ["compress_latent", "decompress_latent", "jpeg_within"]

LEVELS = 255
SUBSAMPLINGS = (0, 2)  # Pillow's names of 4:4:4 and 4:2:0


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

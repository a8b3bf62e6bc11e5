"""Latents in few bits a number: what they take as a stream of bytes, and what comes back of it.

One latent, [z, h, w], is quantised to 2 to 8 bits a number, uniformly between the smallest and the largest value of each of its channels;
the codes, channel after channel, one byte each, are deflated at level 9. The stream is 8 bytes for each channel (minimum and step,
little-endian fp32), then the deflated codes: all that is needed to decode, given the model and the image size. zlib rather than lzma: on a
few kilobytes of codes its header is smaller and its Huffman tables get as far. Codes of less than 8 bits are not packed, for the Huffman
code does that, and better where some are rarer than others; but deflate's search for repeats then finds many that cost more than they
save, up to a fifth of the stream on noise, so the smallest of four ways to search is taken. For 8 bits they differ by 0.1 %.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latentae.errors import ModelError, RecipeError

__all__ = ["compress_latent", "decompress_latent", "quantise"]

SEARCHES = (
    zlib.Z_DEFAULT_STRATEGY,
    zlib.Z_FILTERED,
    zlib.Z_HUFFMAN_ONLY,
    zlib.Z_RLE,
)  # one deflate format, which any inflate reads


def compress_latent(latent: Tensor, bits: int = 8) -> bytes:
    """A latent [z, h, w] as the bytes described at the top of this module.

    Args:
        latent: finite.
        bits: 2 to 8 for each number, before entropy coding.

    Raises:
        ModelError: the latent is not finite.
        RecipeError: bits outside the range.
    """
    if not 2 <= bits <= 8:
        raise RecipeError(f"bits is {bits}; latents are quantised to 2 to 8 bits a number")
    if not torch.isfinite(latent).all():
        raise ModelError(
            "the latent has NaN or infinite values and can't be quantised; the model has diverged, use another checkpoint"
        )
    levels = 2**bits - 1
    channels = latent.detach().cpu().float().flatten(1).numpy()
    low = channels.min(1, keepdims=True)
    step = ((channels.max(1, keepdims=True).astype(np.float64) - low) / levels).astype(np.float32)
    codes = (
        np.rint((channels.astype(np.float64) - low) / np.where(step > 0, step, 1))
        .clip(0, levels)
        .astype(np.uint8)
    )
    return np.concatenate([low, step], axis=1).astype("<f4").tobytes() + _deflate(codes.tobytes(), bits)


def decompress_latent(data: bytes, shape: Sequence[int]) -> Tensor:
    """The latent fp32 [z, h, w] that `compress_latent` stored, whatever the bits: minimum + step * code."""
    header = np.frombuffer(data[: 8 * shape[0]], dtype="<f4").reshape(shape[0], 2)
    codes = np.frombuffer(zlib.decompress(data[8 * shape[0] :]), dtype=np.uint8).reshape(shape[0], -1)
    values = header[:, :1] + header[:, 1:] * codes.astype(np.float32)
    return torch.from_numpy(values.astype(np.float32)).reshape(*shape)


def quantise(latents: Tensor, bits: int = 8) -> tuple[Tensor, list[int]]:
    """Latents [B, z, h, w] as they come back from their bytes, each image for itself, and the number of these bytes.

    Args:
        latents: floating point, finite.
        bits: 2 to 8 for each number.

    Returns:
        The latents with the type, shape and device they came with, and B sizes in bytes.

    Raises:
        ModelError: a latent is not finite.
        RecipeError: bits outside the range.
    """
    streams = [compress_latent(latent, bits) for latent in latents.detach().cpu()]
    restored = torch.empty(latents.shape)
    for index, stream in enumerate(streams):
        restored[index] = decompress_latent(stream, latents.shape[1:])
    return restored.to(latents), [len(stream) for stream in streams]


def _deflate(codes: bytes, bits: int) -> bytes:
    if bits == 8:
        return zlib.compress(codes, 9)
    streams = []
    for search in SEARCHES:
        coder = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, search)
        streams.append(coder.compress(codes) + coder.flush())
    return min(streams, key=len)

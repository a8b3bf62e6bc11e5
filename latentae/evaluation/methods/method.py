"""The interface of methods, the methods that count floats, and latents as streams of bytes.

A latent [z, h, w] is quantized uniformly between the smallest and largest value of each channel, to
2 to 8 bits per number. The stream holds 8 bytes per channel (minimum and step, little-endian fp32),
then the codes, one byte each, channel after channel, deflated at level 9. Given the model and the
image size, the stream is all that decoding needs.

zlib beats lzma on a few kilobytes of codes: its header is smaller and its Huffman tables are as
good. Codes of fewer than 8 bits are not packed, because the Huffman code does it better. But
deflate then finds repeats that cost more than they save, up to a fifth of the stream on noise, so
the smallest of four search strategies is used. For 8 bits they differ by 0.1 %.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from latentae.data.transforms import to_float, to_uint8
from latentae.errors import ModelError, RecipeError
from latentae.measures.metrics import finite_rows
from latentae.models.base import Autoencoder
from latentae.models.pca import PatchBasis

__all__ = [
    "Method",
    "ModelMethod",
    "PatchMethod",
    "Result",
    "compress_latent",
    "decompress_latent",
    "quantize",
]

STRATEGIES = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)


@dataclass(frozen=True)
class Result:
    """A batch of images restored by a method.

    Attributes:
        images: uint8 [B, C, H, W], on the device of the originals.
        numbers: other values per image, such as "bytes" or "quality"; NaN for missing images.
        missing: rows of the batch without a result; their images are ignored.
    """

    images: Tensor
    numbers: dict[str, list[float]] = field(default_factory=dict)
    missing: frozenset[int] = frozenset()


class Method(Protocol):
    """A codec, a basis of patches or a model.

    Attributes:
        name: key in metrics.json and per_image.csv.
        label: name in tables.
    """

    name: str
    label: str

    def __call__(self, images: Tensor, budgets: Sequence[int]) -> Result:
        """Compress and restore images.

        Args:
            images: uint8 [B, C, H, W].
            budgets: maximum bytes of each image; methods that count floats ignore them.
        """
        ...


class ModelMethod:
    """Another model's reconstruction from its posterior mean.

    `bytes` is the size of its deflated 8-bit latent. An image with a non-finite latent or
    reconstruction is missing.

    Args:
        name: key in metrics.json.
        label: name in tables.
        model: in evaluation mode, on the device of the images.
    """

    def __init__(self, name: str, label: str, model: Autoencoder) -> None:
        self.name, self.label, self.model = name, label, model

    def __call__(self, images: Tensor, budgets: Sequence[int]) -> Result:
        """See `Method`."""
        mode = self.model.encode(to_float(images)).mode()
        decoded = self.model.decode(mode)
        finite = finite_rows(mode, decoded).tolist()
        sizes = [
            float(len(compress_latent(z))) if ok else math.nan for z, ok in zip(mode, finite, strict=True)
        ]
        missing = frozenset(row for row, ok in enumerate(finite) if not ok)
        return Result(to_uint8(decoded.nan_to_num()), {"bytes": sizes}, missing)


class PatchMethod:
    """Projection of image patches onto a basis with z components, not quantized.

    Args:
        name: "pca" or "dct", the key in metrics.json.
        label: name in tables.
        basis: of patches the size of one latent pixel.
    """

    def __init__(self, name: str, label: str, basis: PatchBasis) -> None:
        self.name, self.label, self.basis = name, label, basis

    def __call__(self, images: Tensor, budgets: Sequence[int]) -> Result:
        """See `Method`.

        Raises:
            ImageError: the basis was fitted on other channels, or its patches do not divide a side.
        """
        return Result(self.basis.reconstruct(images))


def compress_latent(latent: Tensor, bits: int = 8) -> bytes:
    """Quantize and compress a latent [z, h, w].

    Args:
        latent: finite.
        bits: 2 to 8 per number, before entropy coding.

    Raises:
        ModelError: the latent is not finite.
        RecipeError: `bits` is out of range.
    """
    if not 2 <= bits <= 8:
        raise RecipeError(f"bits is {bits}; latents are quantized to 2 to 8 bits a number")
    if not torch.isfinite(latent).all():
        raise ModelError(
            "the latent has NaN or infinite values and can't be quantized; the model has diverged, use "
            "another checkpoint"
        )
    levels = 2**bits - 1
    channels = latent.detach().cpu().float().flatten(1).numpy()
    low = channels.min(1, keepdims=True)
    step = ((channels.max(1, keepdims=True).astype(np.float64) - low) / levels).astype(np.float32)
    codes = np.rint((channels.astype(np.float64) - low) / np.where(step > 0, step, 1)).clip(0, levels)
    header = np.concatenate([low, step], axis=1).astype("<f4").tobytes()
    return header + _deflate(codes.astype(np.uint8).tobytes(), bits)


def decompress_latent(data: bytes, shape: Sequence[int]) -> Tensor:
    """The latent fp32 [z, h, w] in a stream of `compress_latent`: minimum + step * code."""
    header = np.frombuffer(data[: 8 * shape[0]], dtype="<f4").reshape(shape[0], 2)
    codes = np.frombuffer(zlib.decompress(data[8 * shape[0] :]), dtype=np.uint8).reshape(shape[0], -1)
    values = header[:, :1] + header[:, 1:] * codes.astype(np.float32)
    return torch.from_numpy(values.astype(np.float32)).reshape(*shape)


def quantize(latents: Tensor, bits: int = 8) -> tuple[Tensor, list[int]]:
    """Compress and decompress latents, each image separately.

    Args:
        latents: floating point [B, z, h, w], finite.
        bits: 2 to 8 per number.

    Returns:
        The latents after the round trip, with unchanged dtype, shape and device, and their B sizes
        in bytes.

    Raises:
        ModelError: a latent is not finite.
        RecipeError: `bits` is out of range.
    """
    streams = [compress_latent(latent, bits) for latent in latents.detach().cpu()]
    restored = torch.empty(latents.shape)
    for row, stream in enumerate(streams):
        restored[row] = decompress_latent(stream, latents.shape[1:])
    return restored.to(latents), [len(stream) for stream in streams]


def _deflate(codes: bytes, bits: int) -> bytes:
    if bits == 8:
        return zlib.compress(codes, 9)
    coders = [
        zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
        for strategy in STRATEGIES
    ]
    return min((coder.compress(codes) + coder.flush() for coder in coders), key=len)

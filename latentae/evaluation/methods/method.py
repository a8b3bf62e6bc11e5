"""The interface of methods, and the methods that count floats: models and patch bases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from latentae.data.transforms import to_float, to_uint8
from latentae.evaluation.methods.latent_bytes import compress_latent
from latentae.models.base import Autoencoder
from latentae.models.pca import PatchBasis

__all__ = ["Method", "ModelMethod", "PatchMethod", "Result", "finite_rows"]


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


def finite_rows(*values: Tensor) -> Tensor:
    """Rows of the batch in which all values [B, ...] are finite: bool [B]."""
    return torch.stack([torch.isfinite(value).flatten(1).all(1) for value in values]).all(0)


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

"""What a method is: uint8 images in, what became of them out, with the numbers of each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

__all__ = ["Made", "Method"]


@dataclass(frozen=True)
class Made:
    """What a method made of a batch.

    Attributes:
        images: uint8 [B, C, H, W], on the device of the originals.
        numbers: what else is known of each image, such as "bytes" or "quality"; NaN where there is no result.
        missing: positions in the batch that the method has no result for; their images count for nothing.
    """

    images: Tensor
    numbers: dict[str, list[float]] = field(default_factory=dict)
    missing: frozenset[int] = frozenset()


class Method(Protocol):
    """A codec or a model."""

    name: str
    """In metrics.json and per_image.csv."""
    label: str
    """In tables."""

    def __call__(self, images: Tensor, budgets: Sequence[int]) -> Made:
        """Shrink and restore images.

        Args:
            images: uint8 [B, C, H, W].
            budgets: bytes that each image may take; methods with a budget of their own (so many floats) ignore it.
        """
        ...

"""What image codecs share: the best file of an image within a budget of bytes, where quality is all that can be turned.

A file counts whole, with its headers. Bisection finds a quality that fits while one step more does not. Files hardly ever shrink as
quality rises: in 1 to 3 of 100 steps on photos of 16 to 256 pixels, so that the very highest quality that fits was at most 4 steps off.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentae.errors import ImageError
from latentae.evaluation.methods.base import Made

__all__ = ["Coded", "ImageCodec"]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names by number of channels


@dataclass(frozen=True)
class Coded:
    """A file of an image.

    Attributes:
        data: the whole file.
        image: what it decodes to, uint8 [C, H, W].
        quality: on the codec's own scale.
        variant: how it was coded otherwise, one of `ImageCodec.variants`.
    """

    data: bytes
    image: Tensor
    quality: int
    variant: str


class ImageCodec(ABC):
    """A file format with a quality, as a method: each image in at most as many bytes as its budget.

    Attributes:
        name: in metrics.json and per_image.csv.
        label: in tables.
        format: Pillow's name of the format, as it is also written in text.
        qualities: all that there are, worst first.
    """

    name: str
    label: str
    format: str
    qualities: range

    @abstractmethod
    def refuses(self, channels: int) -> str:
        """Why images of so many channels can't be coded, as one clause; empty where they can."""

    @abstractmethod
    def variants(self, channels: int) -> tuple[str, ...]:
        """Ways to code an image beside quality, such as "4:2:0"; one that needs no name is ""."""

    @abstractmethod
    def encode(self, image: Tensor, quality: int, variant: str) -> bytes:
        """The whole file of an image uint8 [C, H, W]."""

    def decode(self, data: bytes, channels: int) -> Tensor:
        """The image in a file: uint8 [C, H, W]."""
        with Image.open(io.BytesIO(data)) as picture:
            pixels = np.array(picture.convert(MODES[channels]))
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1).contiguous()

    def within(self, image: Tensor, budget: int) -> Coded | None:
        """The best file of an image uint8 [C, H, W] in at most `budget` bytes; None when the lowest quality is already larger.

        The highest quality that fits is found for each variant; the one nearer to the image (squared error) wins.
        """
        best, smallest = None, math.inf
        for variant in self.variants(image.shape[0]):
            found = self._highest_quality(image, variant, budget)
            if found is None:
                continue
            restored = self.decode(found[1], image.shape[0])
            error = float((restored.double() - image.double()).square().mean())
            if error < smallest:
                best, smallest = Coded(found[1], restored, found[0], variant), error
        return best

    def __call__(self, images: Tensor, budgets: Sequence[int]) -> Made:
        """Each image in its budget; `numbers` are "bytes" and "quality".

        Args:
            images: uint8 [B, C, H, W].
            budgets: bytes for the whole file of each.

        Raises:
            ImageError: the format has no images of so many channels.
        """
        if reason := self.refuses(images.shape[1]):
            raise ImageError(reason)
        originals = images.cpu()
        files = [self.within(image, budget) for image, budget in zip(originals, budgets, strict=True)]
        restored = torch.zeros_like(originals)
        for index, file in enumerate(files):
            if file is not None:
                restored[index] = file.image
        numbers = {
            "bytes": [float(len(file.data)) if file else math.nan for file in files],
            "quality": [float(file.quality) if file else math.nan for file in files],
        }
        return Made(
            restored.to(images.device), numbers, frozenset(i for i, file in enumerate(files) if file is None)
        )

    def _highest_quality(self, image: Tensor, variant: str, budget: int) -> tuple[int, bytes] | None:
        low, high, best = (
            self.qualities[0] - 1,
            self.qualities[-1] + 1,
            b"",
        )  # quality `low` fits, `high` does not, or there is none
        while high - low > 1:
            quality = (low + high) // 2
            data = self.encode(image, quality, variant)
            if len(data) <= budget:
                low, best = quality, data
            else:
                high = quality
        return (low, best) if best else None

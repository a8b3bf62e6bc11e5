"""JPEG and WebP within a budget of bytes: each image at the best quality whose file fits.

The size of a file includes its headers. Bisection finds a quality that fits while the next one does
not. File size almost always grows with quality. On photos of 16 to 256 pixels 1 to 3 % of the steps
shrink, and bisection ends at most 4 qualities below the best one.
"""

from __future__ import annotations

import io
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, features
from torch import Tensor

from latentae.errors import ImageError
from latentae.evaluation.methods.method import Result
from latentae.pages.images import pil_image

__all__ = ["Coded", "ImageCodec", "Jpeg", "WebP"]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names by number of channels
SUBSAMPLING = {"4:4:4": 0, "4:2:0": 2}  # Pillow's numbers
JPEG_HEADERS = 4096  # more bytes than the headers and tables of a JPEG take
WEBP_EFFORT = 4  # 0 to 6; 6 saves 5 % of the bytes of a photo in nearly twice the time
EXACT_ALPHA, LOSSY_ALPHA = "exact alpha", "lossy alpha"
_buffer = threading.Lock()


@dataclass(frozen=True)
class Coded:
    """The file of an image.

    Attributes:
        data: the file, with headers.
        image: the decoded image, uint8 [C, H, W].
        quality: on the codec's own scale.
        variant: one of `ImageCodec.variants`.
    """

    data: bytes
    image: Tensor
    quality: int
    variant: str


class ImageCodec(ABC):
    """A lossy file format as a method: each image in at most its budget of bytes.

    Attributes:
        name: key in metrics.json and per_image.csv.
        label: name in tables.
        format: Pillow's name of the format.
        qualities: worst first.
    """

    name: str
    label: str
    format: str
    qualities: range

    @abstractmethod
    def refuses(self, channels: int) -> str:
        """Why images with this number of channels can't be coded; empty if they can."""

    @abstractmethod
    def variants(self, channels: int) -> tuple[str, ...]:
        """Settings other than quality, such as "4:2:0"; "" where there is only one."""

    @abstractmethod
    def encode(self, image: Tensor, quality: int, variant: str) -> bytes:
        """The file of an image uint8 [C, H, W]."""

    def decode(self, data: bytes, channels: int) -> Tensor:
        """The image in a file: uint8 [C, H, W]."""
        with Image.open(io.BytesIO(data)) as picture:
            pixels = np.array(picture.convert(MODES[channels]))
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1).contiguous()

    def within(self, image: Tensor, budget: int) -> Coded | None:
        """Code an image uint8 [C, H, W] in at most `budget` bytes.

        Each variant gets the highest quality that fits; the variant with the smallest squared error
        wins.

        Returns:
            None if the lowest quality exceeds the budget.
        """
        best, smallest = None, math.inf
        for variant in self.variants(image.shape[0]):
            quality, data = self._highest_quality(image, variant, budget)
            if not data:
                continue
            restored = self.decode(data, image.shape[0])
            error = float((restored.double() - image.double()).square().mean())
            if error < smallest:
                best, smallest = Coded(data, restored, quality, variant), error
        return best

    def __call__(self, images: Tensor, budgets: Sequence[int]) -> Result:
        """See `Method`; `numbers` are "bytes" and "quality".

        Raises:
            ImageError: the format does not support this number of channels.
        """
        if reason := self.refuses(images.shape[1]):
            raise ImageError(reason)
        originals = images.cpu()
        files = [self.within(image, budget) for image, budget in zip(originals, budgets, strict=True)]
        restored = torch.zeros_like(originals)
        for row, file in enumerate(files):
            if file is not None:
                restored[row] = file.image
        numbers = {
            "bytes": [float(len(file.data)) if file else math.nan for file in files],
            "quality": [float(file.quality) if file else math.nan for file in files],
        }
        missing = frozenset(row for row, file in enumerate(files) if file is None)
        return Result(restored.to(images.device), numbers, missing)

    def _highest_quality(self, image: Tensor, variant: str, budget: int) -> tuple[int, bytes]:
        """The highest quality that fits and its file, which is empty if none fits."""
        low, high, best = self.qualities[0] - 1, self.qualities[-1] + 1, b""
        while high - low > 1:  # `low` fits or is no quality, `high` does not fit or is no quality
            quality = (low + high) // 2
            data = self.encode(image, quality, variant)
            if len(data) <= budget:
                low, best = quality, data
            else:
                high = quality
        return low, best


class Jpeg(ImageCodec):
    """JPEG with optimized Huffman tables, with and without chroma subsampling. Gray or RGB."""

    name: str = "jpeg"
    label: str = "JPEG in the same bytes"
    format: str = "JPEG"
    qualities: range = range(1, 101)

    def refuses(self, channels: int) -> str:
        """See `ImageCodec`."""
        if channels == 4:
            return "JPEG has no transparency, which images of 4 channels have; WebP has it"
        return "" if channels in (1, 3) else f"JPEG has images of 1 or 3 channels, these have {channels}"

    def variants(self, channels: int) -> tuple[str, ...]:
        """Chroma subsampling, except for gray."""
        return tuple(SUBSAMPLING) if channels == 3 else ("",)

    def encode(self, image: Tensor, quality: int, variant: str) -> bytes:
        """See `ImageCodec`."""
        options: dict[str, Any] = {"subsampling": SUBSAMPLING[variant]} if variant else {}
        file = io.BytesIO()
        # Optimized tables need the file to fit one buffer; Pillow's guess of 1 or 2 bytes a pixel
        # fails on noise
        with _buffer:
            usual = ImageFile.MAXBLOCK
            ImageFile.MAXBLOCK = max(usual, 4 * image.numel() + JPEG_HEADERS)
            try:
                pil_image(image).save(file, self.format, quality=quality, optimize=True, **options)
            finally:
                ImageFile.MAXBLOCK = usual
        return file.getvalue()


class WebP(ImageCodec):
    """Lossy WebP, with alpha either exact or at the quality of the colors. Gray, RGB or RGBA.

    WebP subsamples chroma. Gray is stored as RGB, which costs a few bytes for empty chroma. Colors
    under transparent pixels are kept (`exact`), because the metrics count them.
    """

    name: str = "webp"
    label: str = "WebP in the same bytes"
    format: str = "WebP"
    qualities: range = range(101)

    def refuses(self, channels: int) -> str:
        """See `ImageCodec`."""
        if not features.check("webp"):
            return "the Pillow installed here was built without WebP; install its own wheel"
        return "" if channels in MODES else f"WebP has images of 1, 3 or 4 channels, these have {channels}"

    def variants(self, channels: int) -> tuple[str, ...]:
        """Quality of alpha, for RGBA."""
        return (EXACT_ALPHA, LOSSY_ALPHA) if channels == 4 else ("",)

    def encode(self, image: Tensor, quality: int, variant: str) -> bytes:
        """See `ImageCodec`."""
        picture, file = pil_image(image), io.BytesIO()
        if picture.mode == "L":
            picture = picture.convert("RGB")
        alpha = quality if variant == LOSSY_ALPHA else 100
        options: dict[str, Any] = {"method": WEBP_EFFORT, "lossless": False, "exact": True}
        picture.save(file, self.format, quality=quality, alpha_quality=alpha, **options)
        return file.getvalue()

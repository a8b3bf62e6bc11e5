"""JPEG in a budget of bytes: the whole file, with headers and optimised Huffman tables."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import ImageFile
from torch import Tensor

from latentae.evaluation.methods.codec import ImageCodec
from latentae.pages.images import pil_image

__all__ = ["Jpeg"]

SUBSAMPLING = {"4:4:4": 0, "4:2:0": 2}  # Pillow's numbers
MARKERS = 4096  # more bytes than the headers and tables of a JPEG take
_buffer = threading.Lock()


class Jpeg(ImageCodec):
    """JPEG at the highest quality (1 to 100) that fits, with or without chroma subsampling, whichever is nearer. Gray or RGB."""

    name: str = "jpeg"
    label: str = "JPEG in the same bytes"
    format: str = "JPEG"
    qualities: range = range(1, 101)

    def refuses(self, channels: int) -> str:
        """Why images of so many channels can't be coded, as one clause; empty where they can."""
        if channels == 4:
            return "JPEG has no transparency, which images of 4 channels have; WebP has it"
        return "" if channels in (1, 3) else f"JPEG has images of 1 or 3 channels, these have {channels}"

    def variants(self, channels: int) -> tuple[str, ...]:
        """Chroma subsampling; gray has none."""
        return tuple(SUBSAMPLING) if channels == 3 else ("",)

    def encode(self, image: Tensor, quality: int, variant: str) -> bytes:
        """The whole file of an image uint8 [C, H, W] with 1 or 3 channels."""
        options = {"subsampling": SUBSAMPLING[variant]} if variant else {}
        file = io.BytesIO()
        with _room(4 * image.numel() + MARKERS):
            pil_image(image).save(file, self.format, quality=quality, optimize=True, **options)
        return file.getvalue()


@contextmanager
def _room(size: int) -> Iterator[None]:
    """Let Pillow write `size` bytes in one go: optimised tables need it, and Pillow's guess of 1 or 2 bytes a pixel fails on noise."""
    with _buffer:
        usual = ImageFile.MAXBLOCK
        ImageFile.MAXBLOCK = max(usual, size)
        try:
            yield
        finally:
            ImageFile.MAXBLOCK = usual

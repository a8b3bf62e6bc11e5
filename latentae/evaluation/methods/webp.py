"""Lossy WebP in a budget of bytes: the whole file, with its headers.

WebP knows RGB with chroma at half resolution, and transparency. Gray goes through RGB and comes back as luma, which costs a few bytes for
chroma that says nothing. Colours under transparent pixels are kept (`exact`), because the metrics count them.
"""

from __future__ import annotations

import io

from PIL import features
from torch import Tensor

from latentae.evaluation.methods.codec import ImageCodec
from latentae.pages.images import pil_image

__all__ = ["WebP"]

METHOD = 4  # effort, 0 to 6; fixed, for it moves sizes: 6 saves 5 % of the bytes of a photo in nearly twice the time
EXACT_ALPHA, LOSSY_ALPHA = "exact alpha", "lossy alpha"


class WebP(ImageCodec):
    """WebP at the highest quality (0 to 100) that fits; alpha exact, or at the quality of the colours, whichever is nearer."""

    name: str = "webp"
    label: str = "WebP in the same bytes"
    format: str = "WebP"
    qualities: range = range(101)

    def refuses(self, channels: int) -> str:
        """Why images of so many channels can't be coded, as one clause; empty where they can."""
        if not features.check("webp"):
            return "the Pillow installed here was built without WebP; install its own wheel"
        return (
            "" if channels in (1, 3, 4) else f"WebP has images of 1, 3 or 4 channels, these have {channels}"
        )

    def variants(self, channels: int) -> tuple[str, ...]:
        """What becomes of alpha, where there is any."""
        return (EXACT_ALPHA, LOSSY_ALPHA) if channels == 4 else ("",)

    def encode(self, image: Tensor, quality: int, variant: str) -> bytes:
        """The whole file of an image uint8 [C, H, W] with 1, 3 or 4 channels."""
        picture, file = pil_image(image), io.BytesIO()
        if picture.mode == "L":
            picture = picture.convert("RGB")
        alpha = quality if variant == LOSSY_ALPHA else 100
        picture.save(
            file, self.format, quality=quality, method=METHOD, lossless=False, exact=True, alpha_quality=alpha
        )
        return file.getvalue()

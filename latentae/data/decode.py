"""Bytes to pixels: every common image file as uint8 RGB, or an error that names it."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from latentae.errors import ImageError

if TYPE_CHECKING:
    from latentae.data.shards import RawSample

__all__ = ["IMAGE_EXTENSIONS", "MAX_PIXELS", "Sample", "decode_image", "decode_sample", "image_extension"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff")  # in this order where a sample holds several
MAX_PIXELS = 80_000_000  # above any camera in common use; a decompression bomb is refused by its header

# An allow-list: PIL's EPS reader, say, would start a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "PPM", "TIFF")
_filters = threading.Lock()  # warnings.catch_warnings is not thread-safe


@dataclass(frozen=True)
class Sample:
    """One decoded image."""

    key: str
    image: Tensor  # uint8 [3, H, W], RGB


def image_extension(raw: Mapping[str, Any]) -> str | None:
    """Which member of a raw sample is its image; None when there is none."""
    return next((extension for extension in IMAGE_EXTENSIONS if extension in raw), None)


def decode_sample(raw: RawSample) -> Sample:
    """Decode the image of a raw sample; ImageError names its key and shard."""
    key, shard = raw["__key__"], raw.get("__url__")
    name = f"{key} in {shard}" if shard else key
    extension = image_extension(raw)
    if extension is None:
        there = ", ".join(sorted(member for member in raw if not member.startswith("__"))) or "nothing"
        raise ImageError(f"sample {name} has no image: found {there}, expected one of {', '.join(IMAGE_EXTENSIONS)}")
    return Sample(key, decode_image(raw[extension], f"{name} ({extension})"))


def decode_image(data: bytes, name: str) -> Tensor:
    """Decode an image file to uint8 [3, H, W] RGB, a view of [H, W, 3] memory.

    Upright by EXIF; grayscale and palettes become RGB, transparency is laid over white, 16 bits are rounded to 8, CMYK is
    converted without its profile, and the first frame stands for all.

    Args:
        data: the file's bytes.
        name: what error messages call it.

    Raises:
        ImageError: not an image, cut short, of an unknown kind, or more than `MAX_PIXELS` by its header.
    """
    header = _open(data, name)
    try:
        pixels = np.array(_to_rgb(_upright(header), name))
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise ImageError(f"image {name} is damaged or cut short ({_reason(error)}); replace or remove it") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _open(data: bytes, name: str) -> Image.Image:
    """Read the header only, and refuse what must not be decoded."""
    try:
        with _filters, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        found = "an empty file" if not data else f"{data[:12]!r}..."
        raise ImageError(f"{name} is not an image: found {found}, expected a {', '.join(IMAGE_EXTENSIONS)} file") from None
    except Image.DecompressionBombError:
        raise ImageError(f"image {name} has more than {MAX_PIXELS} pixels by its header; resize or remove it") from None
    except Exception as error:
        raise ImageError(f"image {name} is damaged ({_reason(error)}); replace or remove it") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"image {name} is {image.width}x{image.height} by its header, above the limit of {MAX_PIXELS} pixels; resize it"
        )
    return image


def _upright(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)  # the other form copies every upright image
    return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):  # I;16, I;16B, I: 16-bit grayscale, which PIL's own conversion would clip
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ImageError(f"image {name} has values outside 0..65535; save it with 8 or 16 bits")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"image {name} has floating-point pixels of unknown range; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__

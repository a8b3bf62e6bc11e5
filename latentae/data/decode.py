"""Bytes to pixels: every common image file as uint8 or uint16 in sRGB, or an error that names it. The rules are in docs/images.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from latentae.data.headers import EXTENSIONS, IMAGE_EXTENSIONS, MAX_PIXELS, open_image, orientation
from latentae.data.pixels import fit, read_pixels, stored_kind, upright
from latentae.errors import DataError, ImageError

if TYPE_CHECKING:
    from latentae.data.shard_files import RawSample

__all__ = [
    "IMAGE_EXTENSIONS",
    "MAX_PIXELS",
    "ImageKind",
    "Sample",
    "decode_at_least",
    "decode_image",
    "decode_sample",
    "image_extension",
    "image_kind",
    "read_image",
]

LARGE = MAX_PIXELS  # JPEGs of more pixels may be decoded at a reduced scale
MARGIN = 4  # times as large as what is kept of it, at least: 53 dB after resizing, docs/images.md


@dataclass(frozen=True)
class Sample:
    """One decoded image."""

    key: str
    image: Tensor
    """uint8 or uint16 [C, H, W], sRGB."""
    size: tuple[int, int] = (0, 0)
    """Height and width in pixels of the file's image, upright; `image` is smaller where it was decoded at a reduced scale."""


@dataclass(frozen=True)
class ImageKind:
    """How a file stores its image, whatever it is decoded to."""

    gray: bool
    deep: bool
    """More than 8 bits a channel."""


def image_kind(raw: RawSample) -> ImageKind:
    """How the image of a raw sample is stored, by its header; ImageError where it has none that can be read."""
    extension = image_extension(raw)
    if extension is None:
        raise ImageError(f"sample {raw['__key__']} has no image")
    data = raw[extension]
    colours, deep = stored_kind(_open(data, str(raw["__key__"]), None), data)
    return ImageKind(colours == 1, deep)


def image_extension(raw: Mapping[str, Any]) -> str | None:
    """Which member of a raw sample is its image; None when there is none."""
    return next((extension for extension in IMAGE_EXTENSIONS if extension in raw), None)


def decode_sample(
    raw: RawSample,
    *,
    channels: int = 3,
    bits: int = 8,
    max_pixels: int | None = MAX_PIXELS,
    short: int | None = None,
) -> Sample:
    """Decode the image of a raw sample as `decode_image` does; ImageError names its key and shard."""
    key, shard = raw["__key__"], raw.get("__url__")
    name = f"{key} in {shard}" if shard else key
    extension = image_extension(raw)
    if extension is None:
        there = ", ".join(sorted(member for member in raw if not member.startswith("__"))) or "nothing"
        raise ImageError(
            f"sample {name} has no image: found {there}, expected one of {', '.join(IMAGE_EXTENSIONS)}"
        )
    image, size = _decode(raw[extension], f"{name} ({extension})", channels, bits, max_pixels, short=short)
    return Sample(key, image, size)


def read_image(
    path: str | Path,
    *,
    channels: int = 3,
    bits: int | None = 8,
    max_pixels: int | None = MAX_PIXELS,
    short: int | None = None,
) -> Tensor:
    """Decode the image file at `path` as `decode_image` does; a file that can't be read is an ImageError, too."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"could not read {path}: {error.strerror}; give image files") from error
    return decode_image(data, str(path), channels=channels, bits=bits, max_pixels=max_pixels, short=short)


def decode_image(
    data: bytes,
    name: str,
    *,
    channels: int = 3,
    bits: int | None = 8,
    max_pixels: int | None = MAX_PIXELS,
    short: int | None = None,
) -> Tensor:
    """Decode an image file to uint8 or uint16 [channels, H, W], a view of [H, W, channels] memory.

    Upright by EXIF, in sRGB by the embedded ICC profile, the first frame for all; docs/images.md has the rule for each kind of
    file. Nothing in a file is ever executed, and its size is checked before it is decoded.

    Args:
        data: the file's bytes.
        name: what error messages call it.
        channels: 1 is luma, 3 is RGB with transparency laid over white, 4 is RGBA, opaque where the file has no transparency.
        bits: 8 (uint8) or 16 (uint16, 0 to 65535). A file of the other depth is rounded or widened. None keeps what there is: 16
            where the file has more than 8 bits and they can be had, else 8.
        max_pixels: refuse an image of more pixels (height times width) by its header; None is no limit.
        short: pixels of the short side that the caller keeps after resizing. A JPEG of more than 80 million pixels is then decoded
            at 1/2, 1/4 or 1/8 of its size, but with a short side of 4 * `short` or more. None decodes every image in full.

    Raises:
        ImageError: not an image, cut short, of an unknown kind, more than `max_pixels` by its header, or of more than 8 bits
            that can't be had where 16 are asked for.
        DataError: channels or bits of another number.
    """
    return _decode(data, name, channels, bits, max_pixels, short=short)[0]


def decode_at_least(data: bytes, name: str, short: int, *, channels: int = 3, bits: int = 8) -> Tensor:
    """As `decode_image`, but a JPEG whose short side is twice `short` or more may come out at 1/2, 1/4 or 1/8 of its size.

    The decoder then skips the high frequencies of each block, which is about a third faster where the image is eight times the
    size that is wanted. The short side is never below `short`. docs/images.md has the error after resizing: with `short` at
    four times the final size it is 53 dB, at twice 45 dB, and at the final size itself 38 dB, which one can see.

    Args:
        data, name, channels, bits: as in `decode_image`.
        short: pixels of the short side to keep at least.
    """
    return _decode(data, name, channels, bits, MAX_PIXELS, at_least=short)[0]


def _decode(
    data: bytes,
    name: str,
    channels: int,
    bits: int | None,
    max_pixels: int | None,
    *,
    short: int | None = None,
    at_least: int | None = None,
) -> tuple[Tensor, tuple[int, int]]:
    """The pixels, and height and width of the file's image, upright."""
    if channels not in (1, 3, 4) or bits not in (8, 16, None):
        raise DataError(
            f"can't decode to {channels} channels of {bits} bits; expected 1, 3 or 4 channels of 8 or 16 bits"
        )
    image = _open(data, name, max_pixels)
    width, height = image.size
    if short is not None and width * height > LARGE:
        at_least = MARGIN * short
    try:
        if at_least is not None:
            _reduce(image, at_least)
        reduced = image.size != (width, height)
        pixels = read_pixels(image, lambda: _open(data, name, max_pixels), data, name, bits or 8)
        bits = bits or 8 * pixels.dtype.itemsize
        turn = orientation(image)
        pixels = np.ascontiguousarray(fit(upright(pixels, turn), channels, bits))
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise ImageError(
            f"image {name} is damaged or cut short ({_reason(error)}); replace or remove it"
        ) from error
    full = (
        ((width, height) if turn >= 5 else (height, width)) if reduced else (pixels.shape[0], pixels.shape[1])
    )
    return torch.from_numpy(pixels).permute(2, 0, 1), full


def _reduce(image: Image.Image, short: int) -> None:
    """Ask for scaled decoding, as far as the short side stays `short` or more; only JPEG can."""
    for factor in (8, 4, 2):
        if min(image.size) // factor >= max(short, 1):
            image.draft(image.mode, (image.width // factor, image.height // factor))
            return


def _open(data: bytes, name: str, max_pixels: int | None) -> Image.Image:
    """Read the header only, and refuse what must not be decoded."""
    if (
        max_pixels is not None and Image.MAX_IMAGE_PIXELS is not None
    ):  # its readers of TIFF and WebP heed it too
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        image = open_image(data)
    except Exception as error:
        raise ImageError(f"image {name} is damaged ({_reason(error)}); replace or remove it") from error
    if image is None:
        raise ImageError(_unidentified(data, name))
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise ImageError(
            f"image {name} is {image.width}x{image.height} by its header, above the limit of {max_pixels} pixels; give "
            f"--max-pixels {image.width * image.height} (for training --data.max-pixels) or resize it"
        )
    return image


def _unidentified(data: bytes, name: str) -> str:
    if data[4:12] == b"ftypavif" and not features.check("avif"):
        return f"{name} is AVIF, which this Pillow can't read; install Pillow 11.3 or newer from a wheel"
    found = "an empty file" if not data else f"{data[:12]!r}..."
    return f"{name} is not an image: found {found}, expected a {', '.join(EXTENSIONS)} file"


def _reason(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__

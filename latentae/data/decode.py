"""Decode common image files to uint8 or uint16 in sRGB, by the rules of docs/images.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from latentae.data.headers import EXTENSIONS, IMAGE_EXTENSIONS, MAX_PIXELS, open_image, orientation
from latentae.data.pixels import fit, read_pixels, stored_kind, upright
from latentae.data.shard_files import RawSample
from latentae.errors import DataError, ImageError, first_line

__all__ = [
    "IMAGE_EXTENSIONS",
    "MAX_PIXELS",
    "ImageKind",
    "Sample",
    "decode_image",
    "decode_sample",
    "image_extension",
    "image_kind",
    "read_image",
]

LARGE = MAX_PIXELS  # JPEGs of more pixels may be decoded at a reduced scale
MARGIN = 4  # smallest ratio of decoded to final size; the error after resizing is 53 dB, docs/images.md


@dataclass(frozen=True)
class Sample:
    """One decoded image."""

    key: str
    image: Tensor
    """uint8 or uint16 [C, H, W], sRGB."""
    size: tuple[int, int] = (0, 0)
    """Height and width of the file's upright image in pixels.

    `image` is smaller if it was decoded at a reduced scale.
    """


class ImageKind(NamedTuple):
    """How a file stores its image."""

    gray: bool
    deep: bool
    """More than 8 bits per channel."""


def image_kind(raw: RawSample) -> ImageKind:
    """How the image of a raw sample is stored, by its header.

    ImageError if it has no readable image.
    """
    extension = image_extension(raw)
    if extension is None:
        raise ImageError(f"sample {raw['__key__']} has no image")
    data = raw[extension]
    colors, deep = stored_kind(_open(data, str(raw["__key__"]), None), data)
    return ImageKind(colors == 1, deep)


def image_extension(raw: Mapping[str, Any]) -> str | None:
    """The member of a raw sample that is its image; None if there is none."""
    return next((extension for extension in IMAGE_EXTENSIONS if extension in raw), None)


class DecodeOptions(TypedDict, total=False):
    """Options of `decode_image`, which explains them."""

    channels: int
    bits: int | None
    max_pixels: int | None
    short: int | None


def decode_sample(raw: RawSample, **options: Unpack[DecodeOptions]) -> Sample:
    """Decode the image of a raw sample as `decode_image` does.

    ImageError names its key and shard.
    """
    key, shard = raw["__key__"], raw.get("__url__")
    name = f"{key} in {shard}" if shard else key
    extension = image_extension(raw)
    if extension is None:
        found = ", ".join(sorted(member for member in raw if not member.startswith("__"))) or "nothing"
        expected = ", ".join(IMAGE_EXTENSIONS)
        raise ImageError(f"sample {name} has no image: found {found}, expected one of {expected}")
    image, size = _decode(raw[extension], f"{name} ({extension})", **options)
    return Sample(key, image, size)


def read_image(path: str | Path, **options: Unpack[DecodeOptions]) -> Tensor:
    """Decode the image file at `path` as `decode_image` does.

    An unreadable file is an ImageError too.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"could not read {path}: {error.strerror}; give image files") from error
    return _decode(data, str(path), **options)[0]


def decode_image(data: bytes, name: str, **options: Unpack[DecodeOptions]) -> Tensor:
    """Decode an image file to uint8 or uint16 [channels, H, W], a view of [H, W, channels] memory.

    The image is upright by EXIF, in sRGB by the embedded ICC profile, and the first frame of an
    animation. docs/images.md has the rules of each format. Nothing in a file is executed, and its
    size is checked before it is decoded.

    Args:
        data: the file's bytes.
        name: its name in error messages.
        channels: 1 is luma, 3 (the default) is RGB over white, 4 is RGBA, opaque if the file has no
            transparency.
        bits: 8 (uint8, the default) or 16 (uint16, 0 to 65535). A file of the other depth is
            rounded or widened. None keeps 16 bits of files with more than 8 bits where possible,
            otherwise 8.
        max_pixels: refuse an image of more pixels (height times width) by its header. The default
            is 80 million; None is no limit.
        short: pixels of the short side that the caller keeps after resizing. A JPEG of more than 80
            million pixels is then decoded at 1/2, 1/4 or 1/8 of its size, with a short side of at
            least 4 * `short`. None (the default) decodes in full.

    Raises:
        ImageError: not an image, cut short, of an unknown format, more than `max_pixels` by its
            header, or with more than 8 bits that can't be decoded although 16 are requested.
        DataError: an invalid number of channels or bits.
    """
    return _decode(data, name, **options)[0]


def _decode(
    data: bytes,
    name: str,
    channels: int = 3,
    bits: int | None = 8,
    max_pixels: int | None = MAX_PIXELS,
    short: int | None = None,
) -> tuple[Tensor, tuple[int, int]]:
    """The pixels, and height and width of the file's upright image."""
    if channels not in (1, 3, 4) or bits not in (8, 16, None):
        expected = "expected 1, 3 or 4 channels of 8 or 16 bits"
        raise DataError(f"can't decode to {channels} channels of {bits} bits; {expected}")
    image = _open(data, name, max_pixels)
    width, height = image.size
    try:
        if short is not None and width * height > LARGE:
            _reduce(image, MARGIN * short)
        reduced = image.size != (width, height)
        pixels = read_pixels(image, lambda: _open(data, name, max_pixels), data, name, bits or 8)
        bits = bits or 8 * pixels.dtype.itemsize
        turn = orientation(image)
        pixels = np.ascontiguousarray(fit(upright(pixels, turn), channels, bits))
    except ImageError:
        raise
    except Exception as error:  # decoders raise many types on damaged bytes
        reason = first_line(error)
        raise ImageError(f"image {name} is damaged or cut short ({reason}); replace or remove it") from error
    full = (width, height) if turn >= 5 else (height, width)
    return torch.from_numpy(pixels).permute(2, 0, 1), full if reduced else (pixels.shape[0], pixels.shape[1])


def _reduce(image: Image.Image, short: int) -> None:
    """Request scaled decoding that keeps at least `short` pixels of the short side.

    Only JPEG supports it.
    """
    for factor in (8, 4, 2):
        if min(image.size) // factor >= max(short, 1):
            image.draft(image.mode, (image.width // factor, image.height // factor))
            return


def _open(data: bytes, name: str, max_pixels: int | None) -> Image.Image:
    """Read the header only, and refuse what must not be decoded."""
    # The readers of TIFF and WebP check it too.
    if max_pixels is not None and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        image = open_image(data)
    except Exception as error:
        raise ImageError(f"image {name} is damaged ({first_line(error)}); replace or remove it") from error
    if image is None and data[4:12] == b"ftypavif" and not features.check("avif"):
        raise ImageError(f"{name} is AVIF, which this Pillow can't read; install Pillow 11.3 or newer")
    if image is None:
        found = "an empty file" if not data else f"{data[:12]!r}..."
        raise ImageError(f"{name} is not an image: found {found}, expected a {', '.join(EXTENSIONS)} file")
    pixels = image.width * image.height
    if max_pixels is not None and pixels > max_pixels:
        found = f"{image.width}x{image.height} by its header, above the limit of {max_pixels} pixels"
        advice = f"give --max-pixels {pixels} (for training --data.max-pixels) or resize it"
        raise ImageError(f"image {name} is {found}; {advice}")
    return image

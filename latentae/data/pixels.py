"""An opened image file to an array in sRGB: depth, colour profile, orientation, transparency. The rules are in docs/images.md.

Arrays are [H, W, n], uint8 or uint16, over the full range of their type; n says what they hold: 1 gray, 2 gray and alpha, 3 RGB,
4 RGB and alpha. Alpha is never multiplied in.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms

from latentae.errors import ImageError

try:  # a third faster than Pillow, and bit for bit the same
    import simplejpeg  # pyright: ignore[reportMissingImports]
except ImportError:
    simplejpeg = None

__all__ = ["fit", "read_pixels", "stored_kind", "upright"]

Pixels = NDArray[np.uint8 | np.uint16]

_DEEP_COLOUR = re.compile(r"(RGBA?|RGBX);16[BLN]")  # raw modes of which Pillow keeps the high byte
_LOW_BYTE = {
    "B": "L",
    "L": "B",
    "N": "B",
}  # where the other byte lies; N is little-endian on every machine that we know
_HIGH_BITDEPTH = 0x40  # in the third byte of an av1C box, AV1-ISOBMFF section 2.3.3
_ROWS = 32
_UNRULY = {"F": "floating-point pixels of unknown range"}


def read_pixels(
    image: Image.Image, reopen: Callable[[], Image.Image], data: bytes, name: str, bits: int
) -> Pixels:
    """The pixels of an image's first frame, in sRGB and as they are stored, not yet turned upright.

    Args:
        image: opened and not loaded.
        reopen: opens it again.
        data: the file; empty where there is only an opened image.
        name: what error messages call it.
        bits: 8 or 16, what the caller will ask for: 16 refuses what Pillow reads with 8 bits only.

    Raises:
        ImageError: pixels of a kind that has no rule.
    """
    raw_mode = _raw_mode(image)
    profile = image.info.get("icc_profile")
    tags = getattr(image, "tag_v2", {})
    if (
        tags.get(ExifTags.Base.PlanarConfiguration) == 2
        and max(tags.get(ExifTags.Base.BitsPerSample, (8,))) > 8
    ):
        raise ImageError(
            f"image {name} is a 16-bit TIFF with its channels one after the other; save it with interleaved channels"
        )
    _check_covered(image, name)
    if image.mode.startswith("I"):
        pixels = _deep_gray(image, name)
    elif raw_mode == "LA;16B":  # PNG: four bytes a pixel, so Pillow can be told that they are four channels
        both = _load_as(image, "RGBA")
        pixels = _join(both[..., 0::2], both[..., 1::2])
    elif _DEEP_COLOUR.fullmatch(raw_mode):
        pixels = _join(_load_as(image, raw_mode), _load_as(reopen(), raw_mode[:-1] + _LOW_BYTE[raw_mode[-1]]))
        pixels = _key_out(pixels, image.info.get("transparency"))
    else:
        if bits == 16 and (kind := _hidden_depth(image, raw_mode, data)):
            raise ImageError(
                f"image {name} is {kind}, which is read with 8 bits only; save it as a 16-bit RGB PNG or TIFF"
            )
        if image.mode == "CMYK":
            return _from_cmyk(image, profile)
        pixels = _jpeg(image, data)
        pixels = _shallow(image, name) if pixels is None else pixels
    return _to_srgb(pixels, profile, name, bits) if profile else pixels


def stored_kind(image: Image.Image, data: bytes) -> tuple[int, bool]:
    """How an image is stored, by the header of an opened file: colours (1 gray, 3 otherwise), and whether it has more than 8 bits."""
    raw_mode = _raw_mode(image)
    deep = image.mode.startswith("I") or ";16" in raw_mode or _hidden_depth(image, raw_mode, data) is not None
    return (1 if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I") else 3), deep


def _check_covered(image: Image.Image, name: str) -> None:
    """Strips that a damaged TIFF does not list would silently stay black."""
    ends = [tile[1][2:] for tile in getattr(image, "tile", [])]
    if ends and max(end[0] for end in ends) * max(end[1] for end in ends) < image.width * image.height:
        raise ImageError(f"image {name} is damaged: its strips do not cover it; replace or remove it")


def _raw_mode(image: Image.Image) -> str:
    """How the file stores a pixel, in Pillow's words: "RGB;16B"."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else None  # pyright: ignore[reportAttributeAccessIssue]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _load_as(image: Image.Image, raw_mode: str) -> NDArray[np.uint8]:
    """Decode with another choice of bytes: Pillow has no image type for 16-bit colour, but it can be asked for either byte."""
    tiles = []
    for tile in image.tile:  # pyright: ignore[reportAttributeAccessIssue]
        arguments = raw_mode if isinstance(tile[3], str) else (raw_mode, *tile[3][1:])
        tiles.append(tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments))
    image.tile = tiles  # pyright: ignore[reportAttributeAccessIssue]
    return np.array(image)


def _join(high: NDArray[np.uint8], low: NDArray[np.uint8]) -> NDArray[np.uint16]:
    return high.astype(np.uint16) * 256 + low


def _key_out(pixels: NDArray[np.uint16], colour: object) -> NDArray[np.uint16]:
    """With the one colour that a PNG names as transparent, add an alpha channel."""
    if colour is None:
        return pixels
    alpha = np.where((pixels == np.asarray(colour, np.int64)).all(2), 0, 65535).astype(np.uint16)
    return np.dstack([pixels, alpha])


def _deep_gray(image: Image.Image, name: str) -> NDArray[np.uint16]:
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ImageError(f"image {name} has values outside 0..65535; save it with 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})
    if tags.get(ExifTags.Base.BitsPerSample) == (12,):
        values = (values * 65535 + 2047) // 4095
    if (
        tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    ):  # white is zero, which Pillow heeds with 8 bits only
        values = 65535 - values
    return _key_out(values.astype(np.uint16)[..., None], image.info.get("transparency"))


def _hidden_depth(image: Image.Image, raw_mode: str, data: bytes) -> str | None:
    """What a file with more than 8 bits is, if Pillow gives 8 of them and there is no way around it."""
    if ";16" in raw_mode:
        return f"a 16-bit {image.format} of kind {raw_mode.split(';')[0]}"
    if image.format == "PPM":
        arguments = image.tile[0][3]  # pyright: ignore[reportAttributeAccessIssue]
        return (
            "a colour PPM of more than 8 bits"
            if isinstance(arguments, tuple) and arguments[-1] > 255
            else None
        )
    box = data.find(b"av1C") + 6 if image.format == "AVIF" else len(data)
    return "a 10- or 12-bit AVIF" if box < len(data) and data[box] & _HIGH_BITDEPTH else None


def _jpeg(image: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    """By simplejpeg, at the size that the opened image has; None where it is not installed, no JPEG, or anything but sound."""
    if (
        simplejpeg is None
        or not data
        or image.format not in ("JPEG", "MPO")
        or image.mode not in ("L", "RGB")
    ):
        return None
    try:
        colour = "GRAY" if image.mode == "L" else "RGB"
        return simplejpeg.decode_jpeg(data, colour, min_height=image.height, min_width=image.width)
    except ValueError:  # also where libjpeg only warns: Pillow shall judge
        return None


def _shallow(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """What Pillow gives with 8 bits, by its own conversions: palettes looked up, YCbCr to RGB, premultiplied alpha divided out."""
    mode = image.mode
    image.load()  # a transparent colour may come after the pixels
    if mode in ("LA", "La"):
        image = image.convert("LA")
    elif (
        mode in ("RGBA", "RGBa", "PA")
        or "transparency" in image.info
        or getattr(image.palette, "mode", "") == "RGBA"
    ):
        image = image.convert("RGBA")
    elif mode == "1":
        image = image.convert("L")
    elif mode in ("P", "RGBX", "YCbCr"):
        image = image.convert("RGB")
    elif mode not in ("L", "RGB"):
        raise ImageError(
            f"image {name} has {_UNRULY.get(mode, f'the colour mode {mode}')}; save it as RGB with 8 or 16 bits"
        )
    pixels = np.array(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _from_cmyk(image: Image.Image, profile: bytes | None) -> NDArray[np.uint8]:
    transform = _transform(profile, "CMYK") if profile else None
    return np.array(ImageCms.applyTransform(image, transform) if transform else image.convert("RGB"))


def _to_srgb(pixels: Pixels, profile: bytes, name: str, bits: int) -> Pixels:
    """Through the embedded profile, if that changes anything; alpha stays as it is."""
    colours = pixels.shape[2] - 1 + pixels.shape[2] % 2
    transform = _transform(profile, "L" if colours == 1 else "RGB")
    if transform is None:
        return pixels
    if pixels.dtype == np.uint16:
        if bits == 16:
            raise ImageError(
                f"image {name} has 16 bits and a colour profile that is not sRGB, which is converted with 8 bits only; "
                "save it in sRGB, or decode it with 8 bits"
            )
        pixels = _to_8_bits(pixels)
    source = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if colours == 1 else pixels[..., :3]))
    return np.dstack([np.asarray(ImageCms.applyTransform(source, transform)), pixels[..., colours:]])


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From an embedded profile to sRGB: relative colorimetric, black points matched.

    None where the profile is damaged, is of another kind of colour than the image, or is sRGB by any name: where it moves no
    colour of a coarse grid by more than one level.
    """
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    grid = (
        levels[:, None]
        if mode == "L"
        else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(256, 16, 3)
    )
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode == "CMYK":
            return transform
        moved = np.asarray(ImageCms.applyTransform(Image.fromarray(grid), transform)).astype(int)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return transform if np.abs(moved - (grid[..., None] if mode == "L" else grid)).max() > 1 else None


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """A view turned and mirrored as the EXIF orientation says (EXIF 2.32, tag 0x0112)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    # One row is its own mirror image, and NumPy would call it contiguous with a negative stride, which torch does not take.
    if orientation in (3, 4, 7, 8) and pixels.shape[0] > 1:
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7) and pixels.shape[1] > 1:
        pixels = pixels[:, ::-1]
    return pixels


def fit(pixels: Pixels, channels: int, bits: int) -> Pixels:
    """To 1 (luma), 3 (RGB) or 4 (RGBA) channels of 8 or 16 bits, rounded."""
    if pixels.shape[2] in (2, 4) and channels != 4:
        pixels = _over_white(pixels)
    if channels == 1 and pixels.shape[2] == 3:
        pixels = _luma(pixels)
    if channels >= 3 and pixels.shape[2] < channels:
        planes = [pixels[..., 0]] * 3 if pixels.shape[2] <= 2 else [pixels[..., plane] for plane in range(3)]
        alpha = [pixels[..., 1] if pixels.shape[2] == 2 else _top(pixels)]
        pixels = _stack([*planes, *alpha[: channels - 3]], pixels)
    if bits == 8:
        return _to_8_bits(pixels) if pixels.dtype == np.uint16 else pixels
    return pixels.astype(np.uint16) * 257 if pixels.dtype == np.uint8 else pixels  # 65535 = 255 * 257


def _top(pixels: Pixels) -> int:
    return int(np.iinfo(pixels.dtype).max)


def _over_white(pixels: Pixels) -> Pixels:
    top = _top(pixels)
    if (pixels[..., -1] == top).all():
        return pixels[..., :-1]

    def mix(rows: Pixels) -> NDArray[np.uint32]:
        alpha = rows[..., -1:].astype(np.uint32)
        return (
            rows[..., :-1] * alpha + top * (top - alpha) + top // 2
        ) // top  # with 16 bits below 2**32 by 98303

    return _by_rows(mix, pixels, pixels.shape[2] - 1, pixels.dtype)


def _luma(pixels: Pixels) -> Pixels:
    """0.299 R + 0.587 G + 0.114 B, ITU-R BT.601-7 section 2.5.1; with 8 bits bit for bit what Pillow's "L" is."""
    weights = np.array([19595, 38470, 7471], np.uint32)  # of 65536

    def weigh(rows: Pixels) -> NDArray[np.uint32]:
        red, green, blue = (rows[..., plane] * weight for plane, weight in enumerate(weights))
        return ((red + green + blue + 32768) >> 16)[..., None]

    return _by_rows(weigh, pixels, 1, pixels.dtype)


def _to_8_bits(pixels: Pixels) -> NDArray[np.uint8]:
    return _by_rows(
        lambda rows: (rows.astype(np.uint32) * 255 + 32767) // 65535, pixels, pixels.shape[2], np.uint8
    )


def _by_rows(
    convert: Callable[[Pixels], NDArray[np.uint32]], pixels: Pixels, channels: int, dtype: Any
) -> NDArray[Any]:
    """Convert a few rows at a time: 32-bit copies of a large image would take gigabytes, and stay in no cache."""
    converted = np.empty((*pixels.shape[:2], channels), dtype)
    for top in range(0, len(pixels), _ROWS):
        converted[top : top + _ROWS] = convert(pixels[top : top + _ROWS])
    return converted


def _stack(planes: Sequence[Pixels | int], like: Pixels) -> Pixels:
    """As numpy.stack on the last axis, five times as fast."""
    stacked = np.empty((*like.shape[:2], len(planes)), like.dtype)
    for number, plane in enumerate(planes):
        stacked[..., number] = plane
    return stacked

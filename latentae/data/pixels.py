"""Pixels of an opened image file in sRGB, by the rules of docs/images.md.

Arrays are [H, W, n], uint8 or uint16, over the full range of their type. n is 1 for gray, 2 for
gray and alpha, 3 for RGB, 4 for RGB and alpha. Colors are never multiplied by alpha.
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

try:  # a third faster than Pillow, with identical pixels
    import simplejpeg  # pyright: ignore[reportMissingImports]
except ImportError:
    simplejpeg = None

__all__ = ["fit", "read_pixels", "stored_kind", "upright"]

Pixels = NDArray[np.uint8 | np.uint16]

_DEEP_COLOR = re.compile(r"(RGBA?|RGBX);16[BLN]")  # raw modes of which Pillow keeps the high byte
_LOW_BYTE = {"B": "L", "L": "B", "N": "B"}  # byte order for the low byte; N is little-endian everywhere
_HIGH_BITDEPTH = 0x40  # in the third byte of an av1C box, AV1-ISOBMFF section 2.3.3
_ROWS = 32


def read_pixels(
    image: Image.Image, reopen: Callable[[], Image.Image], data: bytes, name: str, bits: int
) -> Pixels:
    """The pixels of an image's first frame, in sRGB, not yet turned upright.

    Args:
        image: opened and not loaded.
        reopen: opens it again.
        data: the file; empty if there is only an opened image.
        name: its name in error messages.
        bits: 8 or 16; 16 refuses deep images that Pillow reads with 8 bits only.

    Raises:
        ImageError: a pixel format without a rule.
    """
    raw_mode = _raw_mode(image)
    profile = image.info.get("icc_profile")
    tags = getattr(image, "tag_v2", {})
    bits_stored = tags.get(ExifTags.Base.BitsPerSample, (8,))
    if tags.get(ExifTags.Base.PlanarConfiguration) == 2 and max(bits_stored) > 8:
        raise ImageError(f"image {name} is a 16-bit TIFF with planar channels; save them interleaved")
    _check_covered(image, name)
    if image.mode.startswith("I"):
        pixels = _deep_gray(image, name)
    elif raw_mode == "LA;16B":  # PNG: four bytes per pixel, which Pillow can read as four channels
        both = _load_as(image, "RGBA")
        pixels = _join(both[..., 0::2], both[..., 1::2])
    elif _DEEP_COLOR.fullmatch(raw_mode):
        pixels = _join(_load_as(image, raw_mode), _load_as(reopen(), raw_mode[:-1] + _LOW_BYTE[raw_mode[-1]]))
        pixels = _key_out(pixels, image.info.get("transparency"))
    else:
        if bits == 16 and (kind := _hidden_depth(image, raw_mode, data)):
            advice = "save it as a 16-bit RGB PNG or TIFF"
            raise ImageError(f"image {name} is {kind}, which is read with 8 bits only; {advice}")
        if image.mode == "CMYK":
            return _from_cmyk(image, profile)
        pixels = _jpeg(image, data)
        pixels = _shallow(image, name) if pixels is None else pixels
    return _to_srgb(pixels, profile, name, bits) if profile else pixels


def stored_kind(image: Image.Image, data: bytes) -> tuple[int, bool]:
    """Number of colors in the file (1 gray, 3 otherwise), and whether it has more than 8 bits."""
    raw_mode = _raw_mode(image)
    deep = image.mode.startswith("I") or ";16" in raw_mode or _hidden_depth(image, raw_mode, data) is not None
    gray = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    return 1 if gray else 3, deep


def _check_covered(image: Image.Image, name: str) -> None:
    """Strips that are missing from a damaged TIFF would silently stay black."""
    ends = [tile[1][2:] for tile in getattr(image, "tile", [])]
    if ends and max(end[0] for end in ends) * max(end[1] for end in ends) < image.width * image.height:
        raise ImageError(f"image {name} is damaged: its strips do not cover it; replace or remove it")


def _raw_mode(image: Image.Image) -> str:
    """How the file stores a pixel, in Pillow's notation: "RGB;16B"."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else None  # pyright: ignore[reportAttributeAccessIssue]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _load_as(image: Image.Image, raw_mode: str) -> NDArray[np.uint8]:
    """Decode with another raw mode: Pillow can read either byte of 16-bit color."""
    tiles = []
    for tile in image.tile:  # pyright: ignore[reportAttributeAccessIssue]
        arguments = raw_mode if isinstance(tile[3], str) else (raw_mode, *tile[3][1:])
        tiles.append(tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments))
    image.tile = tiles  # pyright: ignore[reportAttributeAccessIssue]
    return np.array(image)


def _join(high: NDArray[np.uint8], low: NDArray[np.uint8]) -> NDArray[np.uint16]:
    return high.astype(np.uint16) * 256 + low


def _key_out(pixels: NDArray[np.uint16], color: object) -> NDArray[np.uint16]:
    """Add an alpha channel for the color that a PNG declares transparent."""
    if color is None:
        return pixels
    alpha = np.where((pixels == np.asarray(color, np.int64)).all(2), 0, 65535).astype(np.uint16)
    return np.dstack([pixels, alpha])


def _deep_gray(image: Image.Image, name: str) -> NDArray[np.uint16]:
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ImageError(f"image {name} has values outside 0..65535; save it with 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})
    if tags.get(ExifTags.Base.BitsPerSample) == (12,):
        values = (values * 65535 + 2047) // 4095
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero; Pillow inverts 8 bits only
        values = 65535 - values
    return _key_out(values.astype(np.uint16)[..., None], image.info.get("transparency"))


def _hidden_depth(image: Image.Image, raw_mode: str, data: bytes) -> str | None:
    """The format of a file with more than 8 bits of which Pillow can only read 8.

    None for all others.
    """
    if ";16" in raw_mode:
        return f"a 16-bit {image.format} of type {raw_mode.split(';')[0]}"
    if image.format == "PPM":
        arguments = image.tile[0][3]  # pyright: ignore[reportAttributeAccessIssue]
        deep = isinstance(arguments, tuple) and arguments[-1] > 255
        return "a color PPM of more than 8 bits" if deep else None
    box = data.find(b"av1C") + 6 if image.format == "AVIF" else len(data)
    return "a 10- or 12-bit AVIF" if box < len(data) and data[box] & _HIGH_BITDEPTH else None


def _jpeg(image: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    """Decode by simplejpeg at the opened image's size.

    None if it is not installed, or for anything but a sound JPEG.
    """
    color = {"L": "GRAY", "RGB": "RGB"}.get(image.mode)
    if simplejpeg is None or not data or color is None or image.format not in ("JPEG", "MPO"):
        return None
    try:
        return simplejpeg.decode_jpeg(data, color, min_height=image.height, min_width=image.width)
    except ValueError:  # also where libjpeg only warns: then Pillow decides
        return None


def _shallow(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """Convert by Pillow to 8-bit channels, also palettes, YCbCr and premultiplied alpha."""
    mode = image.mode
    image.load()  # a transparent color may follow the pixels
    keyed = "transparency" in image.info or getattr(image.palette, "mode", "") == "RGBA"
    if mode in ("LA", "La"):
        image = image.convert("LA")
    elif keyed or mode in ("RGBA", "RGBa", "PA"):
        image = image.convert("RGBA")
    elif mode == "1":
        image = image.convert("L")
    elif mode in ("P", "RGBX", "YCbCr"):
        image = image.convert("RGB")
    elif mode not in ("L", "RGB"):
        found = "floating-point pixels of unknown range" if mode == "F" else f"the color mode {mode}"
        raise ImageError(f"image {name} has {found}; save it as RGB with 8 or 16 bits")
    pixels = np.array(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _from_cmyk(image: Image.Image, profile: bytes | None) -> NDArray[np.uint8]:
    transform = _transform(profile, "CMYK") if profile else None
    return np.array(ImageCms.applyTransform(image, transform) if transform else image.convert("RGB"))


def _to_srgb(pixels: Pixels, profile: bytes, name: str, bits: int) -> Pixels:
    """Apply the embedded profile if that changes anything; alpha is unchanged."""
    colors = pixels.shape[2] - 1 + pixels.shape[2] % 2
    transform = _transform(profile, "L" if colors == 1 else "RGB")
    if transform is None:
        return pixels
    if pixels.dtype == np.uint16:
        if bits == 16:
            found = "16 bits and a color profile that is not sRGB, which is converted with 8 bits only"
            raise ImageError(f"image {name} has {found}; save it in sRGB, or decode it with 8 bits")
        pixels = _to_8_bits(pixels)
    source = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if colors == 1 else pixels[..., :3]))
    return np.dstack([np.asarray(ImageCms.applyTransform(source, transform)), pixels[..., colors:]])


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Transform to sRGB: relative colorimetric, with black point compensation.

    None if the profile is damaged, is for another color model than the image's, or is sRGB under
    any name: it moves no color of a coarse grid by more than one level.
    """
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(256, 16, 3)
    grid = levels[:, None] if mode == "L" else grid
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
    """A view that is upright by the EXIF orientation (EXIF 2.32, tag 0x0112)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    # NumPy calls one flipped row contiguous despite its negative stride, which torch refuses.
    if orientation in (3, 4, 7, 8) and pixels.shape[0] > 1:
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7) and pixels.shape[1] > 1:
        pixels = pixels[:, ::-1]
    return pixels


def fit(pixels: Pixels, channels: int, bits: int) -> Pixels:
    """Convert to 1 (luma), 3 (RGB) or 4 (RGBA) channels of 8 or 16 bits, rounded."""
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
        # With 16 bits, the sum stays below 2**32 by 98303.
        return (rows[..., :-1] * alpha + top * (top - alpha) + top // 2) // top

    return _by_rows(mix, pixels, pixels.shape[2] - 1, pixels.dtype)


def _luma(pixels: Pixels) -> Pixels:
    """0.299 R + 0.587 G + 0.114 B, ITU-R BT.601-7 section 2.5.1.

    With 8 bits identical to Pillow's "L".
    """
    weights = np.array([19595, 38470, 7471], np.uint32)  # of 65536

    def weigh(rows: Pixels) -> NDArray[np.uint32]:
        red, green, blue = (rows[..., plane] * weight for plane, weight in enumerate(weights))
        return ((red + green + blue + 32768) >> 16)[..., None]

    return _by_rows(weigh, pixels, 1, pixels.dtype)


def _to_8_bits(pixels: Pixels) -> NDArray[np.uint8]:
    def scale(rows: Pixels) -> NDArray[np.uint32]:
        return (rows.astype(np.uint32) * 255 + 32767) // 65535

    return _by_rows(scale, pixels, pixels.shape[2], np.uint8)


def _by_rows(
    convert: Callable[[Pixels], NDArray[np.uint32]], pixels: Pixels, channels: int, dtype: Any
) -> NDArray[Any]:
    """Convert a few rows at a time: 32-bit copies of a large image would take gigabytes."""
    converted = np.empty((*pixels.shape[:2], channels), dtype)
    for top in range(0, len(pixels), _ROWS):
        converted[top : top + _ROWS] = convert(pixels[top : top + _ROWS])
    return converted


def _stack(planes: Sequence[Pixels | int], like: Pixels) -> Pixels:
    """Like numpy.stack on the last axis, but five times as fast."""
    stacked = np.empty((*like.shape[:2], len(planes)), like.dtype)
    for number, plane in enumerate(planes):
        stacked[..., number] = plane
    return stacked

"""Height and width of an image from the first bytes of its file, without decoding it. Loads no torch."""

from __future__ import annotations

import io
import re
import struct
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

__all__ = ["IMAGE_EXTENSIONS", "image_size"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff", "avif")  # decoding prefers them in this order

_STEPS = (1 << 12, 1 << 16, 1 << 26)  # bytes of a file to try with; headers beyond 64 MiB are taken as unknown
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "PPM", "TIFF", "AVIF")  # an allow-list: PIL's EPS reader, say, starts a program
_ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)([0-9])")
_SIDE = 1 << 31  # sides are stored in 32 bits with a sign
_filters = threading.Lock()  # warnings.catch_warnings is not thread-safe


class _MoreNeeded(Exception):
    """The header goes on after the bytes at hand, or is of a kind that PIL reads."""


def image_size(take: Callable[[int], bytes], size: int) -> tuple[int, int] | None:
    """Height and width of an image, upright by its EXIF orientation; None where its header can't be read.

    A decompression bomb is measured like any other image: nothing is decoded.

    Args:
        take: `take(count)` returns the next `count` bytes of the file.
        size: bytes of the file.
    """
    head = b""
    for step in _STEPS:
        head += take(min(step, size) - len(head))
        try:
            found = _quick(head)
        except _MoreNeeded:
            found = _with_pil(head)
        if found is not None:
            return found if 0 < found[0] < _SIDE and 0 < found[1] < _SIDE else None
        if len(head) >= size or not _known(head):
            return None
    return None


def _known(head: bytes) -> bool:
    return head.startswith((b"\xff\xd8", b"\x89PNG", b"RIFF", b"BM", b"P", b"II", b"MM")) or head[4:8] == b"ftyp"


def _quick(head: bytes) -> tuple[int, int] | None:
    """The common cases, some ten times faster than PIL; _MoreNeeded for all others."""
    if head.startswith(b"\xff\xd8\xff"):
        return _jpeg(head)
    if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":
        return _png(head)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP" and len(head) >= 30:
        return _webp(head)
    raise _MoreNeeded


def _jpeg(head: bytes) -> tuple[int, int]:
    """ITU-T T.81, annex B: walk the segments to the frame header."""
    at = 2
    while at + 9 <= len(head):
        if head[at] != 0xFF:
            break
        marker = head[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return struct.unpack_from(">HH", head, at + 5)
        elif marker == 0xE1 or not 0xC0 <= marker <= 0xFE or 0xD0 <= marker <= 0xDA:  # APP1: it may be turned
            break
        else:
            at += 2 + struct.unpack_from(">H", head, at + 2)[0]
    raise _MoreNeeded


def _png(head: bytes) -> tuple[int, int]:
    """The PNG specification, 5: walk the chunks to the first pixels, for one of them may say that the image is turned."""
    at = 8
    while at + 8 <= len(head):
        length, kind = struct.unpack_from(">I4s", head, at)
        if kind == b"IDAT":
            width, height = struct.unpack_from(">II", head, 16)
            return height, width
        if kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            break
        at += 12 + length
    raise _MoreNeeded


def _webp(head: bytes) -> tuple[int, int]:
    """RFC 9649, 2.5 to 2.7."""
    kind = head[12:16]
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8X" and not head[20] & 0x0C:  # no EXIF and no XMP
        return int.from_bytes(head[27:30], "little") + 1, int.from_bytes(head[24:27], "little") + 1
    raise _MoreNeeded


def _with_pil(head: bytes) -> tuple[int, int] | None:
    try:
        with _filters, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _open(head)
            if image is None:
                return None
            width, height = image.size
            turned = _orientation(image) in (5, 6, 7, 8)
    except Exception:  # readers raise nearly anything on damaged or missing bytes
        return None
    return (width, height) if turned else (height, width)


def _open(head: bytes) -> Any:
    """What `Image.open` does, less its check of the size: a bomb's size is wanted, not its pixels."""
    from PIL import Image
    from PIL.JpegImagePlugin import JpegImageFile

    Image.preinit()
    if not all(name in Image.OPEN for name in ("WEBP", "TIFF")):
        Image.init()
    for name in _FORMATS:
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        if accept and not isinstance(accepted := accept(head[:16]), str) and accepted:
            return (JpegImageFile if name == "JPEG" else factory)(io.BytesIO(head), "")
    return None


def _orientation(image: Any) -> int:
    from PIL import Image

    if image.format == "TIFF":  # PIL has turned its size already
        return 1
    exif = Image.Exif()
    with suppress(Exception):  # damaged EXIF data says nothing
        exif.load(image.info.get("exif", b""))
        if _ORIENTATION in exif:
            return int(exif[_ORIENTATION])
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    found = _XMP_ORIENTATION.search(xmp if isinstance(xmp, bytes) else xmp.encode("utf-8", "replace"))
    return int(found[1]) if found else 1

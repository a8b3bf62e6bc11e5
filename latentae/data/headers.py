"""Image headers: which files are images, which readers may open them, and height and width.

Loads no torch.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

__all__ = [
    "EXTENSIONS",
    "IMAGE_EXTENSIONS",
    "MAX_PIXELS",
    "image_extension_of",
    "image_size",
    "open_image",
    "orientation",
]

MAX_PIXELS = 80_000_000  # the default of max_pixels: a decompression bomb is refused by its header

EXTENSIONS = {
    "JPEG": ("jpg", "jpeg", "jfif", "jpe", "jif", "jfi", "pjpeg", "pjp", "mpo"),
    "PNG": ("png", "apng"),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "DIB": ("dib",),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif", "avifs"),
}
"""Allow-list of Pillow's readers, with the extensions of their files.

The EPS reader, for one, would start a program.
"""

_PREFERRED = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff", "avif")
IMAGE_EXTENSIONS = (*_PREFERRED, *(e for group in EXTENSIONS.values() for e in group if e not in _PREFERRED))
"""Lower case, without a dot. Decoding uses the first of these that a sample has."""

_STEPS = (1 << 12, 1 << 16, 1 << 26)  # bytes of a file to try; larger headers are not read
_METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # chunks of a PNG that may contain its orientation
_ORIENTATION = 0x0112
_SIDE = 1 << 31  # sides are stored as signed 32-bit integers
_PNG = b"\x89PNG\r\n\x1a\n"
_filters = threading.Lock()  # warnings.catch_warnings is not thread-safe


class _MoreNeeded(Exception):
    """The header needs more bytes than given, or PIL."""


def image_size(
    take: Callable[[int], bytes], size: int, skip: Callable[[int], object] | None = None
) -> tuple[int, int] | None:
    """Height and width of an image, upright by its EXIF orientation.

    None if its header can't be read. Nothing is decoded.

    Args:
        take: `take(count)` returns the next `count` bytes of the file.
        size: bytes of the file.
        skip: `skip(count)` skips the next `count` bytes; by default they are read. A PNG may have
            metadata after its pixels.
    """
    head = b""
    for step in _STEPS:
        head += take(min(step, size) - len(head))
        try:
            found = _png(_Bytes(head, size, take, skip or take)) if head.startswith(_PNG) else _quick(head)
        except _MoreNeeded:
            found = _with_pil(head, whole=len(head) >= size)
        if found is not None or len(head) >= size or head.startswith(_PNG) or not any(_readers(head)):
            return found if found is not None and 0 < found[0] < _SIDE and 0 < found[1] < _SIDE else None
    return None


def image_extension_of(data: bytes) -> str | None:
    """The extension for an image file by its first bytes; None if no reader accepts it."""
    name = next(_readers(data), None)
    return None if name is None else EXTENSIONS[name][0]


def _quick(head: bytes) -> tuple[int, int]:
    """The common cases, about ten times faster than PIL; _MoreNeeded for all others."""
    if head.startswith(b"\xff\xd8\xff"):
        return _jpeg(head)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP" and len(head) >= 30:
        return _webp(head)
    raise _MoreNeeded


def _jpeg(head: bytes) -> tuple[int, int]:
    """ITU-T T.81, annex B: walk the segments to the first scan."""
    at, found = 2, None
    while at + 9 <= len(head):
        if head[at] != 0xFF:
            break
        marker = head[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xDA and found is not None:  # pixels follow
            return found
        if marker == 0xE1 or not 0xC0 <= marker <= 0xFE or 0xD0 <= marker <= 0xDA:  # APP1 may rotate it
            break
        if marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            found = struct.unpack_from(">HH", head, at + 5)
        at += 2 + struct.unpack_from(">H", head, at + 2)[0]
    raise _MoreNeeded


class _Bytes:
    """Reads a file in order, first from its head.

    Never beyond its end, where another file may begin.
    """

    def __init__(
        self, head: bytes, size: int, take: Callable[[int], bytes], skip: Callable[[int], object]
    ) -> None:
        self._head, self._left, self._take, self._skip = head, size - len(head), take, skip

    def read(self, count: int) -> bytes:
        found, self._head = self._head[:count], self._head[count:]
        missing = min(count - len(found), self._left)
        self._left -= missing
        return found + self._take(missing) if missing else found

    def skip(self, count: int) -> None:
        missing = min(max(count - len(self._head), 0), self._left)
        self._head, self._left = self._head[count:], self._left - missing
        if missing:
            self._skip(missing)


def _png(file: _Bytes) -> tuple[int, int] | None:
    """PNG specification, section 5: walk the chunks.

    Metadata with the orientation may follow the pixels.
    """
    file.skip(len(_PNG))
    first, metadata, pixels = b"", b"", False
    while len(start := file.read(8)) == 8 and (kind := start[4:]).isalpha() and kind != b"IEND":
        length = int.from_bytes(start[:4], "big")
        if kind == b"fcTL" and pixels:  # the second frame of an animation
            break
        pixels = pixels or kind == b"IDAT"
        if kind != b"IHDR" and kind not in _METADATA:
            file.skip(length + 4)
            continue
        if len(metadata) + length > _STEPS[-1]:
            return None
        body, check = file.read(length), file.read(4)
        if kind == b"IHDR":
            first = start + body + check
        else:  # Pillow ignores the checksum of chunks after the pixels
            metadata += start + body + (zlib.crc32(kind + body).to_bytes(4, "big") if pixels else check)
    if len(first) != 25:
        return None
    if metadata:
        return _with_pil(_PNG + first + metadata + bytes(4) + b"IEND\xaeB`\x82", whole=True)
    width, height = struct.unpack_from(">II", first, 8)
    return height, width


def _webp(head: bytes) -> tuple[int, int]:
    """RFC 9649, sections 2.5 to 2.7."""
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


def _with_pil(head: bytes, *, whole: bool) -> tuple[int, int] | None:
    try:
        with _filters, warnings.catch_warnings():
            # Pillow only warns about a TIFF tag beyond the head.
            warnings.simplefilter("ignore" if whole else "error")
            image = _open(head)
            if image is None:
                return None
            width, height = image.size
            # Pillow has already swapped the size of a TIFF with the tag.
            turned = _ORIENTATION not in getattr(image, "tag_v2", ()) and orientation(image) >= 5
    except Exception:  # readers raise many types on damaged or missing bytes
        return None
    return (width, height) if turned else (height, width)


def _readers(head: bytes) -> Iterator[str]:
    """Readers that accept a file by its first bytes."""
    from PIL import Image

    Image.preinit()
    for name in EXTENSIONS:
        if name not in Image.OPEN:
            Image.init()
        accept = Image.OPEN[name][1] if name in Image.OPEN else None
        accepted = accept(head[:16]) if accept else False
        if accepted and not isinstance(accepted, str):  # a text is a reason for refusal
            yield name


def open_image(data: bytes) -> Any:
    """Open an image like `PIL.Image.open`, with the readers of EXTENSIONS only.

    The caller must check the size.

    Returns:
        The opened image, of which only the header is read; None if no reader accepts the data.

    Raises:
        Exception: readers raise many types on damaged bytes.
    """
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _open(data)


def _open(data: bytes) -> Any:
    from PIL import Image
    from PIL.JpegImagePlugin import JpegImageFile

    for name in _readers(data):
        factory: Any = JpegImageFile if name == "JPEG" else Image.OPEN[name][0]
        try:
            return factory(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # another format, as in Image.open
            continue
    return None


def orientation(image: Any) -> int:
    """The orientation by EXIF or XMP, 1 (upright) to 8; 1 if the metadata is damaged.

    For a PNG that is not loaded, only metadata before the pixels is read.
    """
    from PIL import Image

    try:
        exif = Image.Image.getexif(image)  # the method of PngImageFile would decode the image
        value = exif.get(_ORIENTATION, 1)
    except Exception:  # parsers of metadata raise many types on damaged bytes
        return 1
    return value if value in range(1, 9) else 1

"""The rules of docs/images.md: depth, color profiles, transparency, channels and orientation."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from image_files import chunk, noise, png, saved
from PIL import Image, ImageCms, features

from latentae.data.decode import decode_image
from latentae.data.pixels import read_pixels
from latentae.errors import DataError, ImageError

DEEP = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> PNG color type
# Y, x, step y, step x.
ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]


def array(data: bytes, **options) -> np.ndarray:
    return decode_image(data, "x", **options).permute(1, 2, 0).numpy()


def rounded(values: np.ndarray) -> np.ndarray:
    return np.floor(values / 257 + 0.5).astype(np.uint8)


# ---- depth


def filtered(rows: np.ndarray, step: int) -> bytes:
    """Rows of bytes under PNG's five filters in turn."""
    out, above = b"", np.zeros(rows.shape[1], int)
    for number, row in enumerate(rows.astype(int)):
        left, corner = (np.concatenate([np.zeros(step, int), line[:-step]]) for line in (row, above))
        sides = [abs(left + above - corner - side) for side in (left, above, corner)]
        paeth = np.choose(np.argmin(sides, 0), [left, above, corner])
        guess = [0, left, above, (left + above) // 2, paeth][number % 5]
        out, above = out + bytes([number % 5]) + ((row - guess) % 256).astype(np.uint8).tobytes(), row
    return out


def deep_png(pixels: np.ndarray, interlaced: bool = False, extra: bytes = b"") -> bytes:
    height, width, channels = pixels.shape
    passes = [pixels[y::down, x::right] for y, x, down, right in ADAM7] if interlaced else [pixels]
    rows = [part.astype(">u2").view(np.uint8).reshape(part.shape[0], -1) for part in passes if part.size]
    body = b"".join(filtered(part, 2 * channels) for part in rows)
    return png(height, width, body, 16, DEEP[channels], interlaced, extra)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_16_bit_png_keeps_every_bit_and_rounds_to_8(channels, interlaced):
    pixels = noise(11, 13, channels, dtype=np.uint16)
    data = deep_png(pixels, interlaced)
    rgba = np.dstack([pixels[..., [0, 0, 0]] if channels < 3 else pixels[..., :3], pixels[..., -1]])
    if channels in (1, 3):
        rgba[..., 3] = 65535
    found = array(data, channels=4, bits=16)
    assert found.dtype == np.uint16
    assert np.array_equal(found, rgba)
    assert np.array_equal(array(data, channels=4), rounded(rgba))
    if channels == 3:
        assert np.array_equal(array(data, bits=16), pixels)
    if channels == 1:
        assert np.array_equal(array(data, channels=1, bits=16), pixels)
    if channels in (1, 3):  # the color of the first pixel is the transparent one
        color = chunk(b"tRNS", struct.pack(f">{channels}H", *pixels[0, 0].tolist()))
        seen = (pixels != pixels[0, 0]).any(-1) * 65535
        assert np.array_equal(array(deep_png(pixels, interlaced, color), channels=4, bits=16)[..., 3], seen)


@pytest.mark.parametrize(
    ("channels", "order", "compression"), [(1, ">", None), (3, "<", "zlib"), (4, ">", "zlib"), (4, "<", None)]
)
def test_a_16_bit_tiff_keeps_every_bit(channels, order, compression):
    tifffile = pytest.importorskip("tifffile")
    pixels, file = noise(9, 7, channels, dtype=np.uint16), io.BytesIO()
    form = (
        {"photometric": "rgb"} | ({"extrasamples": ["unassalpha"]} if channels == 4 else {})
        if channels > 1
        else {}
    )
    tifffile.imwrite(
        file, pixels[..., 0] if channels == 1 else pixels, byteorder=order, compression=compression, **form
    )
    assert np.array_equal(array(file.getvalue(), channels=channels, bits=16), pixels)
    assert np.array_equal(array(file.getvalue(), channels=channels), rounded(pixels))


def test_16_bit_tiffs_of_other_kinds():
    tifffile = pytest.importorskip("tifffile")

    def tiff(pixels: np.ndarray, **options) -> bytes:
        file = io.BytesIO()
        tifffile.imwrite(file, pixels, **options)
        return file.getvalue()

    gray = noise(4, 5, dtype=np.uint16)
    assert np.array_equal(
        array(tiff(gray, photometric="miniswhite"), channels=1, bits=16)[..., 0], 65535 - gray
    )
    color = noise(4, 5, 4, dtype=np.uint16)
    premultiplied = tiff(color, photometric="rgb", extrasamples=["assocalpha"])
    with pytest.raises(ImageError, match="8 bits only"):
        array(premultiplied, bits=16)
    assert array(premultiplied).shape == (4, 5, 3)
    # It is rotated.
    turned = tiff(color[..., :3], photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    assert np.array_equal(array(turned, bits=16), np.rot90(color[..., :3], -1))
    with pytest.raises(ImageError, match="interleaved"):
        array(tiff(color[..., :3].transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate"))


def test_12_bit_gray_fills_the_range():
    # The tags of a TIFF of 2 x 1 pixels.
    sizes = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    tags = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (256, 257, 273, 278, 279) else 3, 1, n)
        for tag, n in sizes.items()
    )
    # 4095, 1.
    data = (
        b"II*\0" + struct.pack("<I", 12) + b"\xff\xf0\x01\0" + struct.pack("<H", len(sizes)) + tags + bytes(4)
    )
    assert array(data, channels=1, bits=16).ravel().tolist() == [65535, 16]


def test_8_bits_widen_to_the_whole_range(make_png):
    narrow = array(make_png(1))
    assert np.array_equal(array(make_png(1), bits=16), narrow.astype(np.uint16) * 257)
    assert array(saved(Image.new("RGB", (8, 8), "white"), "JPEG"), bits=16).min() == 65535


def test_pnm_of_more_than_8_bits():
    assert array(b"P5 2 1 65535 \x01\x02\xff\xff", channels=1, bits=16).ravel().tolist() == [258, 65535]
    assert array(b"P6 1 1 1023 " + b"\x03\xff" * 3).ravel().tolist() == [255] * 3
    with pytest.raises(ImageError, match="PPM of more than 8 bits"):
        array(b"P6 1 1 1023 " + b"\x03\xff" * 3, bits=16)
    assert array(b"P6 1 1 255 \x01\x02\x03", bits=16).ravel().tolist() == [257, 514, 771]


@pytest.mark.skipif(
    "avif" not in features.modules or not features.check("avif"), reason="this Pillow has no AVIF"
)
def test_a_deep_avif_is_not_passed_off_as_16_bits():
    data = bytearray(saved(Image.new("RGB", (16, 16), "red"), "AVIF"))
    assert array(bytes(data), bits=16).shape == (16, 16, 3)
    image = Image.open(io.BytesIO(bytes(data)))
    data[data.find(b"av1C") + 6] |= 0x40  # Pillow writes none, so only the header is changed
    with pytest.raises(ImageError, match="10- or 12-bit AVIF"):
        read_pixels(image, lambda: image, bytes(data), "x", 16)
    assert read_pixels(image, lambda: image, bytes(data), "x", 8).shape == (16, 16, 3)


# ---- color profiles

D50 = (0.9642, 1.0, 0.8249)
# XYZ under D50.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
DISPLAY_P3 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)


def icc(device: bytes, colors: bytes, space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2 (ICC.1:2001-04)."""
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"wtpt": xyz(D50),
        **tags,
    }
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">8x4s4s4s4s12x4s28x", b"\x02\x20\0\0", device, colors, space, b"acsp") + xyz(D50)[8:]
    whole = head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def xyz(values) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256)) + bytes(2)


def p3() -> bytes:
    columns = {name: xyz(DISPLAY_P3[:, number]) for number, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return icc(
        b"mntr", b"RGB ", b"XYZ ", columns | {name: gamma(2.2) for name in (b"rTRC", b"gTRC", b"bTRC")}
    )


def to_srgb(pixels: np.ndarray) -> np.ndarray:
    """Display P3 with gamma 2.2 to sRGB, IEC 61966-2-1, by the matrices."""
    linear = np.clip((pixels / 255) ** 2.2 @ (np.linalg.inv(SRGB) @ DISPLAY_P3).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_another_profile_is_converted_to_srgb(form):
    pixels = noise(6, 5, 4) // 2 + 60  # inside sRGB
    options = {"icc_profile": p3()} | ({"lossless": True} if form == "WEBP" else {})
    found = array(saved(pixels[..., :3].copy(), form, **options))
    assert np.abs(found - to_srgb(pixels[..., :3])).max() < 2
    with_alpha = array(saved(pixels, form, **options), channels=4)
    assert np.array_equal(with_alpha[..., :3], found)
    assert np.array_equal(with_alpha[..., 3], pixels[..., 3])


def test_a_jpeg_in_another_profile():
    image = Image.new("RGB", (16, 16), (200, 90, 60))
    plain, found = array(saved(image, "JPEG")).astype(int), array(saved(image, "JPEG", icc_profile=p3()))
    assert np.abs(found - to_srgb(plain)).max() < 2
    assert np.abs(found - plain).max() > 10


def test_srgb_by_any_name_changes_nothing():
    pixels = noise(8, 8, 3)
    levels = np.linspace(0, 1, 1024)
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    curve = b"curv" + bytes(4) + struct.pack(">I", 1024) + (linear * 65535).round().astype(">u2").tobytes()
    columns = {name: xyz(SRGB[:, number]) for number, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    measured = icc(b"scnr", b"RGB ", b"XYZ ", columns | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), measured):
        assert np.array_equal(array(saved(pixels, "PNG", icc_profile=profile)), pixels)
        deep = noise(4, 4, 3, dtype=np.uint16)
        data = deep_png(deep, extra=chunk(b"iCCP", b"s\0\0" + zlib.compress(profile)))
        assert np.array_equal(array(data, bits=16), deep)


@pytest.mark.parametrize("profile", [b"not a profile", p3()[:200], p3()[:40] + bytes(20)])
def test_a_damaged_profile_is_ignored(profile):
    pixels = noise(8, 8, 3)
    assert np.array_equal(array(saved(pixels, "PNG", icc_profile=profile)), pixels)


def test_gray_profiles():
    gray = np.arange(0, 256, 5, dtype=np.uint8)[None]
    data = saved(gray, "PNG", icc_profile=icc(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": gamma(1.8)}))
    linear = (gray / 255) ** 1.8
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(array(data, channels=1)[..., 0] - expected).max() < 2
    # A gray image with a profile for RGB: of another color model, so ignored.
    assert np.array_equal(array(saved(gray, "PNG", icc_profile=p3()), channels=1)[..., 0], gray)


def test_a_profile_with_16_bits():
    pixels = noise(4, 4, 3, dtype=np.uint16)
    data = deep_png(pixels, extra=chunk(b"iCCP", b"p3\0\0" + zlib.compress(p3())))
    with pytest.raises(ImageError, match="16 bits and a color profile"):
        array(data, bits=16)
    assert np.abs(array(data) - to_srgb(rounded(pixels))).max() < 2


def test_cmyk_goes_through_its_profile_or_a_formula():
    ink = noise(4, 4, 4)
    image = Image.frombytes("CMYK", (4, 4), ink.tobytes())
    rest = 255 - ink.astype(int)
    assert np.abs(array(saved(image, "TIFF")) - rest[..., :3] * rest[..., 3:] / 255).max() <= 1
    # A press without color: lightness falls with the ink. An 8-bit lookup table from ink to Lab.
    table = b"".join(bytes([255 - 60 * number.bit_count(), 128, 128]) for number in range(16))
    identity = struct.pack(">9i", *(65536 * (number % 4 == 0) for number in range(9)))
    ramp = bytes(range(256))
    lookup = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * ramp + table + 3 * ramp
    found = array(saved(image, "TIFF", icc_profile=icc(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lookup}))).astype(
        int
    )
    assert np.ptp(found, axis=2).max() <= 3
    assert np.corrcoef(found[..., 0].ravel(), -ink.astype(int).sum(2).ravel())[0, 1] > 0.98


# ---- transparency, palettes, channels


def test_channels_of_every_kind_of_image():
    rgba = noise(5, 6, 4)
    image = Image.fromarray(rgba)
    white = rgba[..., :3] * (rgba[..., 3:] / 255) + 255 - rgba[..., 3:]
    data = saved(image, "PNG")
    assert np.array_equal(array(data, channels=4), rgba)
    assert np.abs(array(data) - white).max() <= 0.51
    assert np.abs(array(data, channels=1)[..., 0] - white @ [0.299, 0.587, 0.114]).max() <= 1.1
    rgb = image.convert("RGB")
    assert np.array_equal(array(saved(rgb, "PNG"), channels=1)[..., 0], np.asarray(rgb.convert("L")))
    assert np.array_equal(array(saved(rgb, "PNG"), channels=4), np.asarray(rgb.convert("RGBA")))
    gray = rgb.convert("L")
    assert np.array_equal(array(saved(gray, "PNG"), channels=4), np.asarray(gray.convert("RGBA")))
    assert np.array_equal(array(saved(gray, "PNG"), channels=1)[..., 0], np.asarray(gray))
    assert np.array_equal(array(saved(gray, "PNG")), np.asarray(gray.convert("RGB")))
    gray.putalpha(Image.fromarray(rgba[..., 3].copy()))
    assert np.array_equal(array(saved(gray, "PNG"), channels=4), np.asarray(gray.convert("RGBA")))
    assert array(saved(gray, "PNG"), channels=1).shape == (5, 6, 1)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_a_transparent_color(mode):
    image = Image.new(mode, (2, 1))
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 255, 255])
    image.putpixel((1, 0), {"1": 1, "L": 255, "RGB": (255, 255, 255), "P": 1}[mode])
    data = saved(image, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert array(data, channels=4)[0].tolist() == [[0, 0, 0, 0], [255] * 4]
    assert array(data, channels=3).min() == 255


def test_a_palette_with_alpha_for_each_color():
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for column in range(3):
        image.putpixel((column, 0), column)
    found = array(saved(image, "PNG", transparency=bytes([0, 128, 255])), channels=4)
    assert found[0].tolist() == [[10, 20, 30, 0], [40, 50, 60, 128], [70, 80, 90, 255]]
    assert array(saved(image, "PNG"))[0].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]


def test_ycbcr_becomes_rgb_and_lab_is_refused():
    red = Image.new("RGB", (4, 4), (200, 30, 40))
    assert np.abs(array(saved(red.convert("YCbCr"), "TIFF")).astype(int) - [200, 30, 40]).max() <= 2
    lab = ImageCms.applyTransform(
        red,
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
    )
    with pytest.raises(ImageError, match="LAB"):
        array(saved(lab, "TIFF"))


@pytest.mark.parametrize(("channels", "bits"), [(2, 8), (5, 8), (3, 12), (0, 16)])
def test_other_numbers_of_channels_or_bits_are_refused(make_png, channels, bits):
    with pytest.raises(DataError, match="1, 3 or 4 channels of 8 or 16 bits"):
        decode_image(make_png(1), "x", channels=channels, bits=bits)


# ---- orientation


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("value", range(1, 9))
def test_each_orientation_is_turned_upright(form, value):
    pixels = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = value
    turns = {
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: np.rot90(np.fliplr(a)),
        6: lambda a: np.rot90(a, -1),
    }
    turns |= {7: lambda a: np.rot90(np.fliplr(a), -1), 8: np.rot90, 1: np.asarray}
    data = saved(pixels, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    assert np.array_equal(array(data), turns[value](pixels))
    assert np.array_equal(
        array(data, channels=4, bits=16)[..., :3], turns[value](pixels).astype(np.uint16) * 257
    )


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damaged_exif_is_ignored(form):
    image = Image.new("RGB", (8, 4), "red")
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\0\x05", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert torch.equal(
            decode_image(saved(image, form, exif=exif), "x"), decode_image(saved(image, form), "x")
        )

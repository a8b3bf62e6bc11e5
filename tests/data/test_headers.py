"""The size by the header is that of the upright image, for every format and orientation."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import chunk, noise, png, saved
from PIL import Image, ImageOps, PngImagePlugin, features

from latentae.data import decode, headers
from latentae.data.decode import decode_image
from latentae.data.headers import IMAGE_EXTENSIONS, image_extension_of, image_size
from latentae.data.shard_index import load_index
from latentae.data.shards import write_shards
from latentae.data.tables import scan

FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "TIFF",
    "BMP",
    "DIB",
    "PPM",
    *(["AVIF"] * features.check("avif")),
)
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'
ORIENTATIONS = st.integers(0, 9)


def made(form: str, height: int = 40, width: int = 60, mode: str = "RGB", **options) -> bytes:
    return saved(Image.fromarray(noise(height, width, 3)).convert(mode), form, **options)


def size(data: bytes) -> tuple[int, int] | None:
    return image_size(io.BytesIO(data).read, len(data))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_sizes_are_those_of_the_upright_image(form, orientation):
    assert_size_of_pillow(made(form, exif=exif(orientation)))


@pytest.mark.parametrize(
    "data",
    [
        made("JPEG", progressive=True),
        made("JPEG", mode="L"),
        made("JPEG", icc_profile=bytes(100_000)),  # the frame header comes after several segments
        made("PNG", mode="RGBA"),
        made("PNG", icc_profile=bytes(100_000)),
        made("WEBP", lossless=True),
        made("WEBP", mode="RGBA"),
        made("TIFF", compression="tiff_lzw"),
        made("JPEG", exif=b"Exif\0\0" + b"damaged"),
    ],
    ids=lambda data: str(len(data)),
)
def test_variants_have_their_size(data):
    assert size(data) == (40, 60)


def test_the_smallest_and_the_largest_are_measured_without_being_decoded():
    for data in (
        b"",
        b"<html>not found</html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"\xff\xd8\xff",
        b"II*\0" + bytes(9),
    ):
        assert size(data) is None
    assert size(made("PNG", 1, 1)) == (1, 1)
    assert size(made("JPEG", 1, 1)) == (1, 1)
    assert size(png(30_000, 30_000)) == (30_000, 30_000)
    assert size(png(0, 5)) is None
    assert size(png((1 << 32) - 1, 5)) is None
    turned = bytearray(
        made("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")
    )
    frame = turned.index(b"\xff\xc0")
    turned[frame + 5 : frame + 9] = struct.pack(">HH", 30_000, 20_000)
    assert size(bytes(turned)) == (20_000, 30_000)  # through PIL, which would refuse to open a bomb


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_damaged_headers_have_a_size_or_none(data):
    content = bytearray(made(data.draw(st.sampled_from(FORMATS)), 8, 9))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 200)))] = data.draw(st.integers(0, 255))
    found = size(bytes(content[: data.draw(st.integers(0, len(content)))]))
    assert found is None or min(found) > 0


def test_a_header_is_enough():
    data, taken = made("JPEG", 400, 600), []

    def take(count: int) -> bytes:
        taken.append(count)
        return data[sum(taken) - count : sum(taken)]

    assert image_size(take, len(data)) == (400, 600)
    assert sum(taken) <= 4096 < len(data)
    assert headers.IMAGE_EXTENSIONS == decode.IMAGE_EXTENSIONS, (
        "decoding and measuring choose the same member"
    )


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def raw_profile(orientation: int, compressed: bool) -> bytes:
    """As ImageMagick writes EXIF into a text chunk."""
    data = exif(orientation).hex()
    text = f"\nexif\n{len(data) // 2:8}\n{data}\n".encode()
    key = b"Raw profile type exif\0"
    return chunk(b"zTXt", key + b"\0" + zlib.compress(text)) if compressed else chunk(b"tEXt", key + text)


def png_metadata(orientation: int) -> dict[str, bytes]:
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.format(orientation).encode()
    return {
        "eXIf": chunk(b"eXIf", exif(orientation)[6:]),
        "zTXt": raw_profile(orientation, compressed=True),
        "tEXt": raw_profile(orientation, compressed=False),
        "iTXt": chunk(b"iTXt", xmp),
        "text": chunk(b"tEXt", b"Comment\0a text that says nothing"),
        "private": chunk(b"prVt", bytes(70)),
    }


def assert_size_of_pillow(data: bytes) -> tuple[int, int] | None:
    """The size by the header, after a comparison with Pillow's upright image and ours."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
    found = image_size(io.BytesIO(data).read, len(data))
    assert found == (upright.height, upright.width) == tuple(decode_image(data, "x").shape[1:])
    stream = io.BytesIO(data)  # and by jumping over the pixels
    assert found == image_size(stream.read, len(data), lambda count: stream.seek(count, io.SEEK_CUR))
    return found


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["eXIf", "zTXt", "tEXt", "iTXt"])
def test_a_png_is_turned_wherever_it_says_so(how, when):
    data = made("PNG", 3, 5)
    at = data.index(b"IDAT") - 4 if when == "before" else data.index(b"IEND") - 4
    assert assert_size_of_pillow(data[:at] + png_metadata(6)[how] + data[at:]) == (5, 3)


def test_the_end_of_a_large_png_is_read_without_its_pixels():
    data = made("PNG", 300, 500)
    at = data.index(b"IEND") - 4
    data = data[:at] + png_metadata(8)["eXIf"] + data[at:]
    stream, taken = io.BytesIO(data), []

    def take(count: int) -> bytes:
        taken.append(count)
        return stream.read(count)

    assert image_size(take, len(data), lambda count: stream.seek(count, io.SEEK_CUR)) == (500, 300)
    assert len(data) > 400_000 > 10_000 > sum(taken)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    before=st.lists(st.tuples(st.sampled_from(sorted(png_metadata(1))), ORIENTATIONS), max_size=3),
    after=st.lists(st.tuples(st.sampled_from(sorted(png_metadata(1))), ORIENTATIONS), max_size=3),
)
def test_any_metadata_of_a_png_counts_as_pillow_counts_it(size, before, after):
    data = made("PNG", *size)
    first, last = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    head, tail = (b"".join(png_metadata(value)[name] for name, value in chunks) for chunks in (before, after))
    assert_size_of_pillow(data[:first] + head + data[first:last] + tail + data[last:])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(FORMATS),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    turned=st.none() | ORIENTATIONS,
    in_xmp=st.none() | ORIENTATIONS,
    padding=st.sampled_from([0, 5000]),
)
def test_the_header_of_every_format_has_the_size_of_the_upright_image(form, size, turned, in_xmp, padding):
    options: dict = {}
    if form in ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF") and turned is not None:
        options["exif"] = exif(turned)
    if form in ("JPEG", "MPO", "WEBP", "AVIF") and in_xmp is not None:
        options["xmp"] = (XMP.format(in_xmp) + " " * padding).encode()
    if form == "TIFF" and in_xmp is not None:
        options["tiffinfo"] = {700: (XMP.format(in_xmp) + " " * padding).encode()}
    if form == "PNG" and in_xmp is not None:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.format(in_xmp) + " " * padding)
    if form == "MPO":
        options["save_all"] = True
    if form == "TIFF" and padding:
        options["compression"] = "tiff_lzw"  # its tags come after its pixels
    assert_size_of_pillow(made(form, *size, **options))


def test_a_jpeg_may_say_that_it_is_turned_after_its_frame_header():
    plain, turned = made("JPEG", 3, 5), made("JPEG", 3, 5, exif=exif(6))
    start = turned.index(b"\xff\xe1")
    segment = turned[start : start + 2 + int.from_bytes(turned[start + 2 : start + 4], "big")]
    scan = plain.index(b"\xff\xda")
    assert assert_size_of_pillow(plain[:scan] + segment + plain[scan:]) == (5, 3)


def test_an_animated_png_has_the_metadata_of_its_first_frame():
    frames = [Image.new("RGB", (5, 3), color) for color in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    data = file.getvalue()
    at = data.index(b"IEND") - 4
    assert_size_of_pillow(data[:at] + png_metadata(6)["eXIf"] + data[at:])


def test_an_index_has_the_upright_size(tmp_path):
    data = made("PNG", 3, 5)
    at = data.index(b"IEND") - 4
    write_shards([{"__key__": "a", "png": data[:at] + png_metadata(6)["eXIf"] + data[at:]}], tmp_path)
    for indexed in tmp_path.glob("*.index"):
        indexed.unlink()
    table = load_index([str(tmp_path / "000000.tar")]).table(0)
    assert (int(table.height[0]), int(table.width[0])) == (5, 3)


@pytest.mark.parametrize("damage", ["cut short", "a length that points beyond the file", "long metadata"])
@pytest.mark.parametrize("hashed", [True, False])
def test_a_damaged_png_does_not_run_into_the_next_member(damage, hashed, write_tar, tmp_path):
    data = made("PNG", 40, 50)
    at = data.index(b"IDAT") - 4
    if damage == "cut short":
        data = data[:5000]
    else:
        form = b"IDAT" if damage.startswith("a length") else b"tEXt"
        data = data[:at] + struct.pack(">I", 1 << 20) + form + data[at + 8 :]
    shard = write_tar(
        tmp_path / "a.tar",
        [("a.png", data), ("b.png", made("PNG", 3, 5)), ("c.png", made("PNG", 4, 6))],
    )
    table = scan(str(shard), hashed=hashed)
    assert table.keys() == ["a", "b", "c"]
    assert list(zip(table.height.tolist(), table.width.tolist(), strict=True))[1:] == [(3, 5), (4, 6)]
    if hashed:
        assert table.record["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()


@pytest.mark.parametrize("form", FORMATS)
def test_the_first_bytes_say_which_extension_a_file_should_have(form):
    assert image_extension_of(made(form, save_all=form == "MPO")) in IMAGE_EXTENSIONS
    assert image_extension_of(b"<html>") is None

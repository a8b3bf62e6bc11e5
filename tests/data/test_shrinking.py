from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from image_files import saved
from PIL import Image

from latentae.data.decode import decode_image
from latentae.data.shrinking import encode_jpeg, encode_png, shrink
from latentae.errors import DataError, ImageError


def smooth(*shape: int) -> np.ndarray:
    """Waves without much detail, 0 to 255."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    waves = [127 + 100 * np.sin(rows / 9 + channel) * np.cos(columns / 11) for channel in range(shape[2])]
    return np.stack(waves, -1).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_png_holds_every_pixel(channels, dtype):
    generator = torch.Generator().manual_seed(channels)
    top = torch.iinfo(dtype).max
    image = torch.randint(0, top + 1, (channels, 7, 13), generator=generator).to(dtype)
    bits = 8 if dtype == torch.uint8 else 16
    assert torch.equal(decode_image(encode_png(image), "x", channels=channels, bits=bits), image)


def test_the_pixels_are_those_of_pillows_antialiased_bicubic():
    pixels = smooth(120, 201, 3)
    small = shrink(saved(pixels), "x", 30, None)
    assert small is not None
    expected = np.asarray(Image.fromarray(pixels).resize((50, 30), Image.Resampling.BICUBIC)).astype(int)
    got = decode_image(small[1], "x").permute(1, 2, 0).numpy().astype(int)
    assert small[0] == "png"
    assert abs(got - expected).max() <= 1


def test_jpeg_is_close_and_smaller_at_lower_quality():
    data = saved(smooth(100, 90, 3))
    exact, good, poor = (shrink(data, "x", 45, quality) for quality in (None, 95, 30))
    assert exact is not None
    assert good is not None
    assert poor is not None
    assert (good[0], poor[0]) == ("jpg", "jpg")
    assert len(poor[1]) < len(good[1])
    difference = decode_image(good[1], "x").int() - decode_image(exact[1], "x").int()
    assert difference.shape == (3, 50, 45)
    assert difference.abs().float().mean() < 2


def test_nothing_is_enlarged_or_written_again_at_the_same_size():
    assert [shrink(saved(smooth(24, 40, 3)), "x", short, None) for short in (24, 25, 1000)] == [None] * 3


def test_gray_transparency_and_depth_stay_in_png():
    gray = shrink(saved(smooth(40, 40, 1)[..., 0]), "x", 20, None)
    clear = smooth(40, 40, 4)
    transparent = shrink(saved(clear), "x", 20, None)
    deep = shrink(
        encode_png(torch.from_numpy(smooth(40, 40, 3).astype(np.uint16) * 200 + 7).permute(2, 0, 1)),
        "x",
        20,
        None,
    )
    assert gray is not None
    assert transparent is not None
    assert deep is not None
    assert Image.open(io.BytesIO(gray[1])).mode == "L"
    assert Image.open(io.BytesIO(transparent[1])).mode == "RGBA"
    assert deep[1][24] == 16  # bit depth in IHDR
    assert decode_image(deep[1], "x", bits=16).numpy().max() > 255
    on_white = shrink(saved(clear), "x", 20, 95)
    assert on_white is not None
    assert Image.open(io.BytesIO(on_white[1])).mode == "RGB"


def test_the_result_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    small = shrink(saved(smooth(40, 80, 3), "JPEG", exif=exif), "x", 20, None)
    assert small is not None
    assert Image.open(io.BytesIO(small[1])).size == (20, 40)


def test_a_damaged_image_is_named_and_other_channels_are_refused():
    with pytest.raises(ImageError, match="cat"):
        shrink(saved(smooth(40, 40, 3))[:200], "cat", 20, None)
    with pytest.raises(ImageError, match="cat"):
        shrink(b"<html>", "cat", 20, 90)
    with pytest.raises(DataError, match=r"expected uint8"):
        encode_png(torch.zeros(2, 4, 4, dtype=torch.uint8))
    assert Image.open(io.BytesIO(encode_jpeg(torch.zeros(1, 8, 8, dtype=torch.uint8), 90))).mode == "L"

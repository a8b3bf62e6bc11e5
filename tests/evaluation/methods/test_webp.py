from __future__ import annotations

import pytest
import torch
from pillow_files import channels_of, pillow_file

from latentae.evaluation.methods import webp
from latentae.evaluation.methods.webp import WebP


@pytest.mark.parametrize("quality", [0, 50, 100])
def test_files_are_pillows(smooth_images, quality: int):
    rgb = smooth_images(1, 40)
    gray, clear = channels_of(rgb, 1)[0], channels_of(rgb, 4)[0]
    assert WebP().encode(rgb[0], quality, "") == pillow_file(
        rgb[0], "WEBP", quality=quality, method=4, exact=True
    )
    assert WebP().encode(gray, quality, "") == pillow_file(
        gray, "WEBP", mode="RGB", quality=quality, method=4, exact=True
    )
    for variant, alpha in (("exact alpha", 100), ("lossy alpha", quality)):
        theirs = pillow_file(clear, "WEBP", quality=quality, method=4, exact=True, alpha_quality=alpha)
        assert WebP().encode(clear, quality, variant) == theirs


def test_gray_stays_gray_and_alpha_exact_where_it_says_so(smooth_images):
    codec, rgb = WebP(), smooth_images(1, 48)
    gray = channels_of(rgb, 1)[0]
    restored = codec.decode(codec.encode(gray, 100, ""), 1)
    assert restored.shape == gray.shape
    assert (restored.int() - gray.int()).abs().max() <= 6  # WebP's luma has 220 levels
    clear = channels_of(rgb, 4)[0]
    assert torch.equal(codec.decode(codec.encode(clear, 10, "exact alpha"), 4)[3], clear[3])
    assert len(codec.encode(clear, 10, "lossy alpha")) < len(codec.encode(clear, 10, "exact alpha"))


def test_colours_under_transparent_pixels_are_kept(smooth_images):
    image = torch.cat([smooth_images(1, 32)[0], torch.zeros(1, 32, 32, dtype=torch.uint8)])
    restored = WebP().decode(WebP().encode(image, 100, "exact alpha"), 4)
    opaque = WebP().decode(WebP().encode(image[:3], 100, ""), 3)
    assert torch.equal(restored[:3], opaque)
    opaque = torch.cat([image[:3], torch.full((1, 32, 32), 255, dtype=torch.uint8)])
    assert torch.equal(
        WebP().decode(WebP().encode(opaque, 50, "exact alpha"), 4)[3], opaque[3]
    )  # the file then has no alpha


def test_a_pillow_without_webp_says_so(monkeypatch):
    monkeypatch.setattr(webp.features, "check", lambda name: False)
    assert "built without WebP" in WebP().refuses(3)

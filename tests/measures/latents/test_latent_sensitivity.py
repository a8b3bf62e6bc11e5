from __future__ import annotations

import math

import pytest
import torch
from known import Blocks, blocks

from latentae.data.transforms import to_float
from latentae.measures.latents.coding import Coder
from latentae.measures.latents.sensitivity import NOISES, sensitivity


def measured(model, images, keys=None, batch_size=2, std=None, seed=0):
    coder = Coder(model, torch.device("cpu"), batch_size)
    std = torch.full((images.shape[1],), 0.05) if std is None else std
    keys = [f"image {number}" for number in range(len(images))] if keys is None else keys
    return sensitivity(coder, images, coder.encode(to_float(images)), keys=keys, std=std, seed=seed)


def test_noise_through_the_identity_has_the_known_psnr():
    """Mid-gray images, which noise leaves inside the range: MSE = (127.5 t std)^2 + 1/12 for the rounding."""
    images = torch.randint(120, 136, (4, 3, 64, 64), dtype=torch.uint8)
    rows = measured(blocks(), images, std=torch.tensor([0.1, 0.2, 0.3]))
    assert [row["noise"] for row in rows] == list(NOISES)
    for row in rows:
        mse = sum((127.5 * row["noise"] * std) ** 2 for std in (0.1, 0.2, 0.3)) / 3 + 1 / 12
        assert row["psnr"] == pytest.approx(10 * math.log10(255**2 / mse), abs=0.1)
        assert row["drop"] is None  # without noise the PSNR is infinite


def test_the_drop_is_against_the_reconstruction_without_noise(smooth_images):
    images = smooth_images(4, 32)
    exact = measured(blocks(4), images, std=torch.zeros(3))
    assert all(row["drop"] == 0 for row in exact)
    rows = measured(blocks(4), images)
    for row in rows:
        assert row["drop"] == pytest.approx(exact[0]["psnr"] - row["psnr"], abs=1e-9)
    assert 0 < rows[0]["drop"] < rows[1]["drop"] < rows[2]["drop"]


def test_noise_belongs_to_the_key_not_to_the_batch(smooth_images):
    images, keys = smooth_images(5, 32), list("abcde")
    once = measured(blocks(4), images, keys)
    order = [3, 0, 4, 1, 2]
    whole = measured(blocks(4), images, keys, batch_size=5)
    shuffled = measured(blocks(4), images[order], [keys[i] for i in order])
    for row, *others in zip(once, whole, shuffled, strict=True):
        for other in others:
            assert row == pytest.approx(other, rel=1e-9, abs=1e-9)
    assert measured(blocks(4), images, keys, seed=1) != once
    assert measured(blocks(4), images, [key + "!" for key in keys]) != once


def test_a_decoder_that_gives_nan_has_no_psnr(smooth_images):
    class Fragile(Blocks):
        def _decode(self, z, keep_features):
            images, _ = super()._decode(z, keep_features)
            return torch.where(images.abs().amax((1, 2, 3), keepdim=True) > 3, torch.nan, images), None

    rows = measured(Fragile(4), smooth_images(2, 32), std=torch.full((3,), 2.0))
    assert rows[0]["psnr"] is not None
    assert (rows[2]["psnr"], rows[2]["drop"]) == (None, None)

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from known import Blocks, blocks

from latentae.data.transforms import to_float
from latentae.measures.latents.robustness import NOISES, TRANSFORMS, Coder, equivariance, sensitivity
from latentae.measures.metrics import psnr


def measured(model, images, batch_size=2):
    coder = Coder(model, torch.device("cpu"), batch_size)
    return {row["transform"]: row for row in equivariance(coder, images, coder.encode(to_float(images)))}


def test_the_identity_commutes_with_everything(smooth_images):
    rows = measured(blocks(), smooth_images(3, 16))
    assert list(rows) == list(TRANSFORMS)
    for row in rows.values():
        assert row["encoder_error"] == 0
        assert row["decoder_psnr"] is None  # identical images, infinite in dB


def test_means_of_blocks_turn_with_the_image_but_do_not_shrink_with_it(smooth_images):
    images = smooth_images(3, 32)
    rows = measured(blocks(4), images)
    assert rows["rotation 90"]["encoder_error"] < 1e-12
    turned, latent = images.rot90(1, (2, 3)), F.avg_pool2d(to_float(images), 4).rot90(1, (2, 3))
    made = ((latent.repeat_interleave(4, 2).repeat_interleave(4, 3) + 1) * 127.5).round().to(torch.uint8)
    assert rows["rotation 90"]["decoder_psnr"] == pytest.approx(float(psnr(made, turned).mean()), abs=1e-3)
    assert 0 < rows["scale 0.5"]["encoder_error"] < 0.5


def test_the_encoder_error_is_its_formula(smooth_images):
    class Shifted(Blocks):
        """Adds a gradient to the latent, which does not turn with the image."""

        def _encode(self, x, keep_features):
            posterior, _ = super()._encode(x, keep_features)
            posterior.mean = posterior.mean + torch.linspace(-1, 1, posterior.mean.shape[3])
            return posterior, None

    images = smooth_images(3, 16)
    model = Shifted(2)
    found = measured(model, images)["rotation 90"]["encoder_error"]
    x = to_float(images).double()
    with torch.no_grad():
        z, turned = model.encode(x).mean, model.encode(x.rot90(1, (2, 3))).mean
    expected = z.rot90(1, (2, 3))
    spread = (turned - turned.mean((0, 2, 3), keepdim=True)).square().sum()
    assert found == pytest.approx(float((turned - expected).square().sum() / spread), rel=1e-5)
    assert found > 0.1


def test_the_batch_size_changes_nothing(smooth_images):
    images = smooth_images(5, 32)
    one, five = measured(blocks(4), images, 1), measured(blocks(4), images, 5)
    for name in TRANSFORMS:
        for key in ("encoder_error", "decoder_psnr"):
            assert one[name][key] == pytest.approx(five[name][key], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("side", "missing"),
    [
        (4, {"scale 0.25", "scale 0.5", "scale 0.75"}),  # one pixel
        (8, {"scale 0.25", "scale 0.75"}),
        (12, {"scale 0.25", "scale 0.5", "scale 0.75"}),
        (56, {"scale 0.25"}),
        (100, set()),  # 6 of 25 pixels are near a quarter
    ],
)
def test_sizes_that_a_latent_can_not_have_are_said(side, missing):
    rows = measured(blocks(4), torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8))
    assert {name for name, row in rows.items() if "missing" in row} == missing
    for name in missing:
        assert "is not near a whole number" in rows[name]["missing"]
        assert set(rows[name]) == {"transform", "missing"}


def test_a_model_that_refuses_small_images_is_quoted():
    class Picky(Blocks):
        def _encode(self, x, keep_features):
            if x.shape[2] < 8:
                raise RuntimeError("kernel larger than image\nand more")
            return super()._encode(x, keep_features)

    rows = measured(Picky(1), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8))
    assert rows["scale 0.25"]["missing"] == "the model can't take it: kernel larger than image"
    assert "encoder_error" in rows["scale 0.5"]


def test_latents_that_never_vary_have_no_error():
    rows = measured(blocks(4), torch.full((2, 3, 16, 16), 100, dtype=torch.uint8))
    assert all(row["encoder_error"] is None for row in rows.values())


def noisy(model, images, keys=None, batch_size=2, std=None, seed=0):
    coder = Coder(model, torch.device("cpu"), batch_size)
    std = torch.full((images.shape[1],), 0.05) if std is None else std
    keys = [f"image {number}" for number in range(len(images))] if keys is None else keys
    return sensitivity(coder, images, coder.encode(to_float(images)), keys=keys, std=std, seed=seed)


def test_noise_through_the_identity_has_the_known_psnr():
    """Mid-gray images stay in range: MSE = (127.5 t std)^2 + 1/12 for rounding."""
    images = torch.randint(120, 136, (4, 3, 64, 64), dtype=torch.uint8)
    rows = noisy(blocks(), images, std=torch.tensor([0.1, 0.2, 0.3]))
    assert [row["noise"] for row in rows] == list(NOISES)
    for row in rows:
        mse = sum((127.5 * row["noise"] * std) ** 2 for std in (0.1, 0.2, 0.3)) / 3 + 1 / 12
        assert row["psnr"] == pytest.approx(10 * math.log10(255**2 / mse), abs=0.1)
        assert row["drop"] is None  # without noise the PSNR is infinite


def test_the_drop_is_against_the_reconstruction_without_noise(smooth_images):
    images = smooth_images(4, 32)
    exact = noisy(blocks(4), images, std=torch.zeros(3))
    assert all(row["drop"] == 0 for row in exact)
    rows = noisy(blocks(4), images)
    for row in rows:
        assert row["drop"] == pytest.approx(exact[0]["psnr"] - row["psnr"], abs=1e-9)
    assert 0 < rows[0]["drop"] < rows[1]["drop"] < rows[2]["drop"]


def test_noise_belongs_to_the_key_not_to_the_batch(smooth_images):
    images, keys = smooth_images(5, 32), list("abcde")
    once = noisy(blocks(4), images, keys)
    order = [3, 0, 4, 1, 2]
    whole = noisy(blocks(4), images, keys, batch_size=5)
    shuffled = noisy(blocks(4), images[order], [keys[i] for i in order])
    for row, *others in zip(once, whole, shuffled, strict=True):
        for other in others:
            assert row == pytest.approx(other, rel=1e-9, abs=1e-9)
    assert noisy(blocks(4), images, keys, seed=1) != once
    assert noisy(blocks(4), images, [key + "!" for key in keys]) != once


def test_a_decoder_that_gives_nan_has_no_psnr(smooth_images):
    class Fragile(Blocks):
        def _decode(self, z, keep_features):
            images, _ = super()._decode(z, keep_features)
            return torch.where(images.abs().amax((1, 2, 3), keepdim=True) > 3, torch.nan, images), None

    rows = noisy(Fragile(4), smooth_images(2, 32), std=torch.full((3,), 2.0))
    assert rows[0]["psnr"] is not None
    assert (rows[2]["psnr"], rows[2]["drop"]) == (None, None)

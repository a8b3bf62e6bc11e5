"""Curves of real bytes: every point is recomputed plainly, and what can't be measured says why."""

from __future__ import annotations

import json
import math

import pytest
import torch

from latentae.data.transforms import to_float, to_uint8
from latentae.errors import ImageError
from latentae.evaluation.methods.dct import fit_dct
from latentae.evaluation.methods.method import compress_latent, decompress_latent
from latentae.evaluation.rate_distortion import rate_distortion
from latentae.measures.metrics import psnr
from latentae.models.config import LinearAutoencoderConfig
from latentae.models.linear import LinearAutoencoder
from latentae.models.pca import fit_pca


def by_name(result: dict) -> dict[str, dict]:
    return {curve["name"]: curve for curve in result["curves"]}


@pytest.mark.parametrize("batch_size", [2, 5])
def test_points_of_a_model_are_what_its_streams_give(smooth_images, tiny_model, batch_size):
    model, images = tiny_model().eval(), smooth_images(5, 32)
    result = rate_distortion({"model": model}, images, labels={"model": "this model"}, batch_size=batch_size)
    assert result["images"] == 5
    assert not result["left_out"]
    curve = by_name(result)["model"]
    assert curve["label"] == "this model"
    assert [point["setting"] for point in curve["points"]] == [
        f"{bits}-bit latents" for bits in (2, 3, 4, 5, 6, 8)
    ]
    for bits, point in zip((2, 3, 4, 5, 6, 8), curve["points"], strict=True):
        sizes, values = [], []
        for image in images:
            with torch.no_grad():
                latent = model.encode(to_float(image[None])).mean[0]
                sizes.append(len(stream := compress_latent(latent, bits)))
                made = to_uint8(model.decode(decompress_latent(stream, latent.shape)[None]))
            values.append(float(psnr(made, image[None])))
        assert point["bits_per_pixel"] == pytest.approx(
            8 * sum(sizes) / (5 * 32 * 32), rel=2e-3
        )  # a code may fall elsewhere
        assert point["psnr"] == pytest.approx(sum(values) / 5, abs=0.02)


def test_a_linear_model_that_is_pca_lies_on_pcas_curve(smooth_images):
    images = smooth_images(12, 32)
    pca = fit_pca(images, 4, 6)
    model = LinearAutoencoder(LinearAutoencoderConfig(patch=4, latent_channels=6))
    model.load_pca(pca)
    curves = by_name(rate_distortion({"linear": model.eval()}, images, pca=pca, dct=fit_dct(images, 4, 6)))
    assert curves["linear"]["label"] == "linear"
    mine, theirs = curves["linear"]["points"][-1], curves["pca"]["points"][-1]
    assert mine["bits_per_pixel"] == pytest.approx(theirs["bits_per_pixel"], rel=0.01)
    assert mine["psnr"] == pytest.approx(theirs["psnr"], abs=0.02)
    for name in ("pca", "dct"):
        settings = [point["setting"] for point in curves[name]["points"]]
        assert settings == [f"{kept} component{'s' if kept > 1 else ''} in 8 bits" for kept in (1, 2, 4, 6)]
        qualities = [point["psnr"] for point in curves[name]["points"]]
        assert qualities == sorted(qualities)
    assert curves["pca"]["points"][-1]["psnr"] >= curves["dct"]["points"][-1]["psnr"] - 0.1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_curves_rise_and_are_json_for_gray_colour_and_alpha(smooth_images, channels: int):
    images = smooth_images(4, 32)
    images = torch.cat([images, images.flip(3)], 1)[:, :channels]
    pca, dct = fit_pca(images, 4, 4), fit_dct(images, 4, 4)
    model = LinearAutoencoder(
        LinearAutoencoderConfig(patch=4, latent_channels=4, in_channels=channels, out_channels=channels)
    )
    result = rate_distortion({"model": model.eval()}, images, pca=pca, dct=dct, batch_size=3)
    json.loads(json.dumps(result, allow_nan=False))
    names = [curve["name"] for curve in result["curves"]]
    assert names == ["model", "pca", "dct", *(["jpeg"] if channels != 4 else []), "webp"]
    assert [item["name"] for item in result["left_out"]] == (["jpeg"] if channels == 4 else [])
    for curve in result["curves"]:
        rates = [point["bits_per_pixel"] for point in curve["points"]]
        assert rates == sorted(rates)
        assert len(rates) >= 3
    for name in {"jpeg", "webp"} & set(names):  # no setting that another one beats
        qualities = [point["psnr"] for point in by_name(result)[name]["points"]]
        assert qualities == sorted(qualities)
        assert all("quality " in point["setting"] for point in by_name(result)[name]["points"])


def test_images_restored_exactly_are_left_out_of_the_mean():
    flat = torch.full((2, 1, 16, 16), 128, dtype=torch.uint8)
    mixed = flat.clone()
    mixed[1] = torch.randint(0, 256, (1, 16, 16), dtype=torch.uint8)
    exact = by_name(rate_distortion({}, flat))["jpeg"]["points"]
    assert [point["psnr"] for point in exact] == [None]  # the smallest exact file: no other setting beats it
    for point in by_name(rate_distortion({}, mixed))["jpeg"]["points"]:
        assert math.isfinite(point["psnr"])


def test_what_can_not_be_measured_says_why_and_the_rest_goes_on(smooth_images, tiny_model):
    broken = tiny_model().eval()
    torch.nn.init.constant_(broken.decoder.conv_out.bias, torch.nan)
    gray = LinearAutoencoder(
        LinearAutoencoderConfig(patch=4, latent_channels=2, in_channels=1, out_channels=1)
    ).eval()
    coarse = LinearAutoencoder(LinearAutoencoderConfig(patch=5, latent_channels=2)).eval()
    images = smooth_images(2, 32)
    models = {"broken": broken, "gray": gray, "coarse": coarse}
    result = rate_distortion(
        models, images, pca=fit_pca(images[:, :1], 4, 2), labels={"gray": "a gray model"}
    )
    assert [curve["name"] for curve in result["curves"]] == ["jpeg", "webp"]
    reasons = {item["name"]: item["reason"] for item in result["left_out"]}
    assert "2-bit latents have NaN" in reasons["broken"]
    assert "expected [B, 1, H, W]" in reasons["gray"]
    assert "multiples of 5" in reasons["coarse"]
    assert "images have 3 channels" in reasons["pca"]
    assert {item["name"]: item["label"] for item in result["left_out"]}["gray"] == "a gray model"
    for wrong in (images[:0], images.float(), images[0]):
        with pytest.raises(ImageError, match=r"need uint8 images \[N, C, H, W\]"):
            rate_distortion({}, wrong)

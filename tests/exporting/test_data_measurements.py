"""What `export --data` measures, against evaluate and plain formulas on the same images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from latentae import AutoencoderKL, AutoencoderKLConfig, evaluate, export
from latentae.data.loader import image_batches
from latentae.data.transforms import to_float
from latentae.errors import ImageError, ModelError, OutputError, RecipeError, ShardError
from latentae.files import read_json
from latentae.models.presets import preset
from latentae.models.tiling import Tiled

SIDE = 64


def small(channels: int = 3) -> AutoencoderKLConfig:
    """An f4 model for 64 pixels."""
    return preset(
        "tiny",
        in_channels=channels,
        out_channels=channels,
        latent_channels=4,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        sample_size=SIDE,
    )


@pytest.fixture(scope="module")
def model(save_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "small", small())


@pytest.fixture(scope="module")
def measured(model, photo_shards, tmp_path_factory) -> Path:
    """An export with figures at two resolutions."""
    out = tmp_path_factory.mktemp("measured") / "vae"
    export(model, out, data=photo_shards, resolution=[SIDE, 96], perceptual="none", batch_size=4)
    return out


@pytest.fixture(scope="module")
def images(photo_shards) -> torch.Tensor:
    paths = [str(path) for path in sorted(photo_shards.glob("*.tar"))]
    return torch.cat([to_float(batch.images) for batch in image_batches(paths, SIDE, 8)])


@pytest.fixture
def no_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without half precision and tiling, which take seconds; `measured` has them."""
    monkeypatch.setattr("latentae.exporting.export.measure_component", lambda model, request: (None, None))


def test_quality_is_what_evaluate_measures(model, measured, photo_shards):
    for quality in read_json(measured / "latentae.json")["figures"]["quality"]:
        result = evaluate(
            model,
            photo_shards,
            resolution=quality["resolution"],
            perceptual="none",
            frechet="none",
            details=False,
        )
        assert quality["images"] == 6
        for name in ("psnr", "ssim"):
            assert quality["metrics"][name]["mean"] == pytest.approx(
                result["metrics"][name]["mean"], rel=1e-9
            )
    card = (measured / "README.md").read_text()
    assert "| 64 x 64 | 6 | " in card
    assert "| 96 x 96 | 6 | " in card


def test_scaling_and_statistics_are_those_of_the_latents(model, measured, images):
    config, statistics = read_json(measured / "config.json"), read_json(measured / "latent_statistics.json")
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(model).double().encode(images.double())
    variance = posterior.mean.var((0, 2, 3), correction=0) + posterior.std.square().mean((0, 2, 3))
    np.testing.assert_allclose(statistics["latents_mean"], posterior.mean.mean((0, 2, 3)), rtol=0, atol=1e-5)
    np.testing.assert_allclose(statistics["latents_std"], variance.sqrt(), rtol=1e-5)
    overall = (posterior.mean.var(correction=0) + posterior.std.square().mean()).sqrt()
    assert config["scaling_factor"] == pytest.approx(1 / float(overall), rel=1e-5)
    assert "measured over 6 images" in (measured / "README.md").read_text()


def test_measured_statistics_serve_another_export(model, measured, tmp_path):
    export(model, tmp_path / "vae", statistics=measured / "latent_statistics.json")
    assert (
        read_json(tmp_path / "vae/config.json")["scaling_factor"]
        == read_json(measured / "config.json")["scaling_factor"]
    )


@pytest.mark.parametrize("folded", [False, True])
def test_the_preview_reads_latents_as_a_diffusion_model_sees_them(
    folded, model, measured, images, photo_shards, no_audit, tmp_path
):
    """Least squares on the exported component's own normalised latents gives the same pictures and
    R^2.
    """
    out = measured
    if folded:
        out = tmp_path / "vae"
        export(model, out, data=photo_shards, fold_normalization=True, perceptual="none")
    vae = AutoencoderKL.from_pretrained(out)
    with torch.no_grad():
        latents = (vae.encode(images).mode() - vae.config.shift_factor) * vae.config.scaling_factor
    colours = (
        torch.nn.functional.interpolate(images, size=latents.shape[2:], mode="area")
        .movedim(1, -1)
        .reshape(-1, 3)
        .double()
    )
    rows = torch.cat([latents.movedim(1, -1).reshape(-1, 4), torch.ones(colours.shape[0], 1)], dim=1).double()
    fit = rows @ torch.linalg.lstsq(rows, colours).solution
    preview = read_json(out / "latent_preview.json")
    shown = rows[:, :4] @ torch.tensor(preview["latent_rgb_factors"], dtype=torch.float64)
    torch.testing.assert_close(
        shown + torch.tensor(preview["latent_rgb_factors_bias"]), fit, rtol=0, atol=2e-4
    )
    r2 = 1 - (colours - fit).square().sum() / (colours - colours.mean(0)).square().sum()
    assert preview["r2"] == pytest.approx(float(r2), abs=1e-4)
    assert preview["scaling_factor"] == pytest.approx(vae.config.scaling_factor)
    assert f"R^2 {r2:.3f}" in (out / "README.md").read_text()


def test_half_precision_is_audited_and_decides_force_upcast(model, measured):
    audit = read_json(measured / "latentae.json")["figures"]["half_precision"]
    card = (measured / "README.md").read_text()
    assert audit["images"] == 6
    assert audit["force_upcast"] is False
    assert read_json(measured / "config.json")["force_upcast"] is False
    assert "`force_upcast` is false: fp16 was measured to be safe" in card
    assert "| Largest activation, decoder |" in card
    assert "| bf16 against fp32 |" in card


def test_a_model_that_overflows_fp16_keeps_force_upcast(model, photo_shards, tmp_path):
    loud = AutoencoderKL.from_pretrained(model)
    with torch.no_grad():  # the next norm divides it out again, so that fp32 is as it was
        loud.decoder.conv_in.weight.mul_(1e6)
        loud.decoder.conv_in.bias.mul_(1e6)
    loud.save_pretrained(tmp_path / "loud")
    export(tmp_path / "loud", tmp_path / "vae", data=photo_shards, perceptual="none", images=2)
    assert read_json(tmp_path / "vae/config.json")["force_upcast"] is True
    assert "not safe: activations reach" in (tmp_path / "vae/README.md").read_text()


def test_tiling_error_is_that_of_blended_tiles(model, measured, photo_shards):
    tiling = read_json(measured / "latentae.json")["figures"]["tiling"]
    assert (tiling["resolution"], tiling["tile"], tiling["images"]) == (96, 48, 4)
    vae = AutoencoderKL.from_pretrained(model)
    paths = [str(path) for path in sorted(photo_shards.glob("*.tar"))]
    x = torch.cat([to_float(batch.images) for batch in image_batches(paths, 96, 8, limit=4)])
    tiled = Tiled(vae, "blended", tile=48, overlap=0.25)
    with torch.no_grad():
        difference = tiled.decode(tiled.encode(x).mode()) - vae.decode(vae.encode(x).mode())
    assert tiling["largest"] == pytest.approx(float(difference.abs().max()), rel=1e-2)
    assert tiling["largest"] > 1e-4
    assert tiling["psnr"] == pytest.approx(
        10 * np.log10(4 / float(difference.double().square().mean())), abs=0.1
    )
    assert "Blended tiles of 48 pixels" in (measured / "README.md").read_text()


def test_the_same_measured_export_again_measures_nothing(model, measured, photo_shards, capsys, monkeypatch):
    monkeypatch.setattr("latentae.exporting.export.measure_model", None)
    options = {"data": photo_shards, "perceptual": "none"}
    summary = export(model, measured, **options, resolution=[SIDE, 96])
    assert "already holds this export" in capsys.readouterr().err
    assert summary["scaling_factor"] == read_json(measured / "config.json")["scaling_factor"]
    with pytest.raises(OutputError, match=r"data.resolutions"):
        export(model, measured, **options)


@pytest.mark.parametrize(
    ("resolution", "metrics"), [(64, {"psnr", "ssim"}), (8, {"psnr"})]
)  # SSIM's window has 11 pixels
def test_at_most_so_many_images_are_read(resolution, metrics, model, photo_shards, no_audit, tmp_path):
    export(model, tmp_path / "vae", data=photo_shards, images=2, resolution=resolution, perceptual="none")
    assert read_json(tmp_path / "vae/latent_statistics.json")["samples"] == 2
    (quality,) = read_json(tmp_path / "vae/latentae.json")["figures"]["quality"]
    assert set(quality["metrics"]) == metrics
    card = (tmp_path / "vae/README.md").read_text()
    assert f"| {resolution} x {resolution} | 2 | " in card
    assert "activations* were not measured" in card
    assert read_json(tmp_path / "vae/config.json")["force_upcast"] is True


def test_gray_models_have_figures_but_no_preview(save_model, photo_shards, no_audit, tmp_path):
    export(save_model(tmp_path / "gray", small(channels=1)), tmp_path / "vae", data=photo_shards, images=2)
    (quality,) = read_json(tmp_path / "vae/latentae.json")["figures"]["quality"]
    assert quality["metrics"]["psnr"]["n"] == 2
    assert "perceptual" not in quality["metrics"]
    assert not (tmp_path / "vae/latent_preview.json").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resolution": 30}, ImageError, "needs a multiple of 4; use 32"),
        ({"images": 0}, RecipeError, "images is 0, expected 1 or more"),
        ({"perceptual": "taste"}, RecipeError, "perceptual is 'taste', expected one of auto"),
        ({"data": "nowhere"}, ShardError, "nowhere"),
    ],
)
def test_what_can_not_be_measured_is_said_and_leaves_nothing(
    options, error, message, model, photo_shards, tmp_path
):
    with pytest.raises(error, match=message):
        export(model, tmp_path / "vae", **{"data": photo_shards, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_model_is_no_component(model, photo_shards, tmp_path):
    broken = AutoencoderKL.from_pretrained(model)
    with torch.no_grad():
        broken.decoder.conv_out.bias.fill_(float("inf"))
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ModelError, match="NaN or infinite"):
        export(tmp_path / "broken", tmp_path / "vae", data=photo_shards, perceptual="none")
    assert not (tmp_path / "vae").exists()

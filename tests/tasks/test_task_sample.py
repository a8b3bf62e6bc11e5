from __future__ import annotations

import numpy as np
import pytest
import torch
from digit_files import note, pixels, write_images

import latentae
from latentae.data.shards import shards
from latentae.errors import ImageError, ModelError
from latentae.keyed import keyed_normal
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig
from latentae.tasks.sample import fit_latent_gaussian


def test_samples_of_a_fitted_gaussian_are_nearer_to_digits_than_noise_is(made, digits, tmp_path):
    model, inputs, _ = made
    result = latentae.sample(model, tmp_path / "s.png", latents=inputs, count=12, seed=4)
    assert result["distribution"] == "Gaussian fitted to whole latents"
    assert result["fitted_on"] == 150
    assert note(tmp_path / "s.png")["seed"] == 4
    rows = pixels(tmp_path / "s.png")
    samples = torch.stack([_tile(rows, number) for number in range(12)])
    noise = torch.rand(12, 64, generator=torch.Generator().manual_seed(0)) * 255
    assert _nearest(samples, digits[0]) < 0.7 * _nearest(noise, digits[0])
    latentae.sample(model, tmp_path / "more.png", latents=inputs, count=16, seed=4)
    more = pixels(tmp_path / "more.png")
    assert all((_tile(more, number) == samples[number]).all() for number in range(12))


def _tile(picture, number):
    top, left = 4 + 132 * (number // 8), 4 + 132 * (number % 8)
    return torch.from_numpy(
        picture[top : top + 128 : 16, left : left + 128 : 16, 0].astype(np.float32)
    ).flatten()


def _nearest(images, data):
    return float(torch.cdist(images, data.float().flatten(1)).min(dim=1).values.mean())


def test_latents_that_were_encoded_before_serve_as_well(tmp_path):
    model = _tiny(tmp_path / "model")
    write_images(tmp_path / "images", torch.randint(0, 255, (6, 3, 16, 16), dtype=torch.uint8))
    shards(tmp_path / "images", tmp_path / "shards")
    latentae.encode(
        model, str(tmp_path / "shards"), tmp_path / "latents", resolution=16, dtype="fp32", device="cpu"
    )
    stored = latentae.sample(model, tmp_path / "stored.png", latents=tmp_path / "latents", count=3)
    fresh = latentae.sample(
        model, tmp_path / "fresh.png", latents=tmp_path / "images", count=3, resolution=16
    )
    assert stored["fitted_on"] == fresh["fitted_on"] == 6
    assert np.abs(pixels(tmp_path / "stored.png").astype(int) - pixels(tmp_path / "fresh.png")).max() <= 2
    with pytest.raises(ModelError, match="another model"):
        latentae.sample(_tiny(tmp_path / "other", seed=1), tmp_path / "x.png", latents=tmp_path / "latents")


def _tiny(folder, seed=0, recipe=None):
    torch.manual_seed(seed)
    config = AutoencoderKLConfig(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=2,
        mid_block_add_attention=False,
        sample_size=16,
    )
    AutoencoderKL(config).save_pretrained(folder)
    if recipe is not None:
        (folder / "recipe.toml").write_text(recipe)
    return folder


def test_the_prior_is_taken_where_there_is_one_and_refused_where_not(made, tmp_path, capsys):
    linear, *_ = made
    strong = _tiny(tmp_path / "strong", recipe="[loss]\nkl = 0.01\n")
    result = latentae.sample(strong, tmp_path / "s.png", count=3, seed=5)
    assert result["distribution"] == note(tmp_path / "s.png")["distribution"] == "prior N(0, I)"
    assert result["kl"] == 0.01
    with torch.no_grad():  # samples are decoded standard normal latents
        expected = (
            AutoencoderKL.from_pretrained(strong)
            .decode(keyed_normal((3, 2, 8, 8), 5, 0, 0, "sample"))[0]
            .numpy()
        )
    picture = pixels(tmp_path / "s.png")[4:132:8, 4:132:8].transpose(2, 0, 1)
    assert np.abs(picture - ((expected + 1) * 127.5).round().clip(0, 255)).max() <= 1
    capsys.readouterr()
    latentae.sample(_tiny(tmp_path / "weak", recipe="[loss]\nkl = 1e-6\n"), tmp_path / "w.png", count=1)
    assert "hardly pulls" in capsys.readouterr().err
    with pytest.raises(ModelError, match="linear autoencoder"):
        latentae.sample(linear, tmp_path / "x.png")
    for recipe in ("[loss]\nkl = 0.0\n", '[loss]\nkl = 0.1\n[model]\nbottleneck = "deterministic"\n'):
        with pytest.raises(ModelError, match="without KL"):
            latentae.sample(_tiny(tmp_path / "plain", recipe=recipe), tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("side", [2, 40])  # the full covariance, or that of channels
def test_drawn_latents_have_the_fitted_mean_and_covariance(side):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0.0], [0.8, 0.5]])
    mean = torch.randn(2, side, side, generator=generator)
    noise = torch.randn(200, 2, side, side, generator=generator)
    latents = torch.einsum("ij,njhw->nihw", mixing, noise) + mean
    variance = torch.full_like(latents, 0.3)
    gaussian = fit_latent_gaussian(zip(latents.split(37), variance.split(37), strict=True))
    assert gaussian.full == (side == 2)
    drawn = gaussian.color(
        torch.randn(20000 if side == 2 else 300, 2, side, side, generator=generator)
    ).double()
    np.testing.assert_allclose(drawn.mean(0), latents.mean(0), atol=0.5 if side == 40 else 0.05)
    if side == 2:
        expected = torch.cov(latents.double().flatten(1).T, correction=0) + 0.3 * torch.eye(8)
        np.testing.assert_allclose(torch.cov(drawn.flatten(1).T), expected, atol=0.08)
    else:
        deviations = (drawn - latents.double().mean(0)).transpose(0, 1).flatten(1)
        np.testing.assert_allclose(torch.cov(deviations), mixing @ mixing.T + 0.3 * torch.eye(2), atol=0.05)


def test_latents_of_different_sizes_are_refused():
    with pytest.raises(ImageError, match="one size"):
        fit_latent_gaussian([(torch.zeros(2, 3, 4, 4),) * 2, (torch.zeros(1, 3, 4, 5),) * 2])

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from digit_files import write_images
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

import latentae
from latentae.data.shards import shards
from latentae.errors import ImageError, ModelError, RecipeError
from latentae.keyed import keyed_normal
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig
from latentae.models.linear import LinearAutoencoder
from latentae.tasks.latent_gaussian import fit_latent_gaussian
from latentae.tasks.pictures import NOTE, heat_picture


def _pixels(file):
    with Image.open(file) as image:
        return np.asarray(image).copy()


def _note(file):
    with PngImageFile(file) as image:
        return json.loads(image.text[NOTE])


def test_a_small_latent_takes_noise_away(made, tmp_path):
    model, inputs, images = made
    result = latentae.denoise(model, inputs, tmp_path / "out", noise=0.5, seed=3)
    assert result["after"]["low"] > result["before"]["high"] + 0.5
    with (tmp_path / "out" / "psnr.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    clean = images[7, 0].double().numpy()
    for name, column in (("noisy", "before"), ("images", "after")):
        error = ((_pixels(tmp_path / "out" / name / "0007.png") - clean) ** 2).mean()
        assert float(rows[7][column]) == pytest.approx(10 * np.log10(255**2 / error))
    with Image.open(tmp_path / "out" / "examples.png") as picture:
        assert picture.size == (8 * 132 + 4, 3 * 132 + 4)


def test_the_noise_of_an_image_depends_on_seed_and_key_alone(made, tmp_path):
    model, inputs, _ = made
    some = [inputs / f"{number:04}.png" for number in range(30)]
    latentae.denoise(model, some, tmp_path / "a", noise=0.3, batch_size=7)
    latentae.denoise(model, [inputs / "0021.png", inputs / "0003.png"], tmp_path / "b", noise=0.3)
    latentae.denoise(model, [inputs / "0003.png"], tmp_path / "c", noise=0.3, seed=1)
    one, same, other = (_pixels(tmp_path / name / "noisy" / "0003.png") for name in "abc")
    assert (one == same).all()
    assert (one != other).any()
    assert (tmp_path / "a" / "images" / "0021.png").read_bytes() == (
        tmp_path / "b" / "images" / "0021.png"
    ).read_bytes()


def test_without_noise_the_files_are_the_reconstructions_of_any_size(made, tmp_path):
    model, _, images = made
    Image.fromarray(np.tile(images[0, 0].numpy(), (2, 3))[:13, :21]).save(tmp_path / "odd.png")
    shards(tmp_path, tmp_path / "shards")
    result = latentae.denoise(model, tmp_path / "shards", tmp_path / "out")
    assert result == {"images": 1, "noise": 0.0, "seed": 0}
    assert _pixels(tmp_path / "out" / "images" / "odd.png").shape == (13, 21)
    assert not (tmp_path / "out" / "noisy").exists()
    network = LinearAutoencoder.from_pretrained(model)
    with torch.no_grad():
        whole = network.decode(network.encode(images[:1].float() / 127.5 - 1).mode())
    expected = ((whole[0, 0].numpy() + 1) * 127.5).round().clip(0, 255)
    assert np.abs(_pixels(tmp_path / "out" / "images" / "odd.png")[:8, :8] - expected).max() <= 1


def test_a_strip_begins_and_ends_with_the_reconstructions(made, tmp_path):
    model, inputs, images = made
    result = latentae.interpolate(
        model, inputs / "0001.png", inputs / "0002.png", tmp_path / "strip.png", steps=5, mode="spherical"
    )
    note = _note(tmp_path / "strip.png")
    assert note == {key: value for key, value in result.items() if key != "file"}
    assert (note["mode"], note["a"], note["b"]) == ("spherical", "0001", "0002")
    strip = _pixels(tmp_path / "strip.png")
    assert strip.shape == (2 * 132 + 4, 5 * 132 + 4, 3)
    network = LinearAutoencoder.from_pretrained(model)
    with torch.no_grad():
        ends = network.decode(network.encode(images[1:3].float() / 127.5 - 1).mode())[:, 0].numpy()
    for column, end in ((0, ends[0]), (4, ends[1])):
        expected = ((end + 1) * 127.5).round().clip(0, 255)
        for row in (0, 1):
            left, top = 4 + 132 * column, 4 + 132 * row
            assert np.abs(strip[top : top + 128 : 16, left : left + 128 : 16, 0] - expected).max() <= 1


def test_samples_of_a_fitted_gaussian_are_nearer_to_digits_than_noise_is(made, digits, tmp_path):
    model, inputs, _ = made
    result = latentae.sample(model, tmp_path / "s.png", latents=inputs, count=12, seed=4)
    assert result["distribution"] == "Gaussian fitted to whole latents"
    assert result["fitted_on"] == 150
    assert _note(tmp_path / "s.png")["seed"] == 4
    rows = _pixels(tmp_path / "s.png")
    samples = torch.stack([_tile(rows, number) for number in range(12)])
    noise = torch.rand(12, 64, generator=torch.Generator().manual_seed(0)) * 255
    assert _nearest(samples, digits[0]) < 0.7 * _nearest(noise, digits[0])
    latentae.sample(model, tmp_path / "more.png", latents=inputs, count=16, seed=4)
    more = _pixels(tmp_path / "more.png")
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
    assert np.abs(_pixels(tmp_path / "stored.png").astype(int) - _pixels(tmp_path / "fresh.png")).max() <= 2
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
    assert result["distribution"] == _note(tmp_path / "s.png")["distribution"] == "prior N(0, I)"
    assert result["kl"] == 0.01
    with torch.no_grad():  # samples are decoded standard normal latents
        expected = (
            AutoencoderKL.from_pretrained(strong)
            .decode(keyed_normal((3, 2, 8, 8), 5, 0, 0, "sample"))[0]
            .numpy()
        )
    picture = _pixels(tmp_path / "s.png")[4:132:8, 4:132:8].transpose(2, 0, 1)
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


@pytest.mark.parametrize("side", [2, 40])  # the whole covariance, or that of channels
def test_drawn_latents_have_the_fitted_mean_and_covariance(side):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0.0], [0.8, 0.5]])
    mean = torch.randn(2, side, side, generator=generator)
    noise = torch.randn(200, 2, side, side, generator=generator)
    latents = torch.einsum("ij,njhw->nihw", mixing, noise) + mean
    variance = torch.full_like(latents, 0.3)
    gaussian = fit_latent_gaussian(zip(latents.split(37), variance.split(37), strict=True))
    assert gaussian.whole == (side == 2)
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


def test_heat_runs_from_black_to_yellow():
    picture = heat_picture(torch.tensor([[-1.0, 0.0, 0.5, 1.0, 9.0]]))
    assert picture[:, 0, 0].tolist() == picture[:, 0, 1].tolist() == [0, 0, 3]
    light = picture[:, 0].float().mean(0)
    assert light[1] < light[2] < light[3] == light[4]


def test_bad_options_are_refused_before_anything_is_written(made, tmp_path):
    model, inputs, _ = made
    a = inputs / "0001.png"
    with pytest.raises(ImageError, match="ends in"):
        latentae.interpolate(model, a, a, tmp_path / "strip.jpg")
    with pytest.raises(RecipeError, match="linear"):
        latentae.interpolate(model, a, a, tmp_path / "strip.png", mode="cubic")
    with pytest.raises(RecipeError, match="count is 0"):
        latentae.sample(model, tmp_path / "s.png", latents=inputs, count=0)
    with pytest.raises(RecipeError, match="noise is -1"):
        latentae.denoise(model, inputs, tmp_path / "out", noise=-1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ImageError, match="one size"):
        fit_latent_gaussian([(torch.zeros(2, 3, 4, 4),) * 2, (torch.zeros(1, 3, 4, 5),) * 2])


def test_the_verbs_are_the_functions(made, tmp_path, capsys):
    from latentae.cli import main

    model, inputs, _ = made
    one, two = str(inputs / "0001.png"), str(inputs / "0002.png")
    lines = {
        "features": [str(inputs), "--out", str(tmp_path / "f"), "--pool", "moments"],
        "denoise": [one, two, "--out", str(tmp_path / "d"), "--noise", "0.2"],
        "anomaly": [str(inputs), str(inputs), "--out", str(tmp_path / "a"), "--quantile", "0.8"],
        "interpolate": [one, two, "--out", str(tmp_path / "i.png")],
        "sample": ["--latents", str(inputs), "--out", str(tmp_path / "s.png"), "--count", "2"],
    }
    for verb, arguments in lines.items():
        with pytest.raises(SystemExit) as end:
            main([verb, str(model), *arguments])
        assert end.value.code == 0, capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"f", "d", "a", "i.png", "s.png"}
    assert json.loads((tmp_path / "d" / "summary.json").read_text())["noise"] == 0.2
    with pytest.raises(SystemExit) as end:
        main(["sample", str(model), "--out", str(tmp_path / "x.png")])
    assert end.value.code == 1
    assert "linear autoencoder" in capsys.readouterr().err

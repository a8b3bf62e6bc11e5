from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from digit_files import pca_model, pixels
from PIL import Image

import latentae
from latentae.data.shards import shards, write_shards
from latentae.data.shrinking import encode_png
from latentae.errors import OutputError
from latentae.models.linear import LinearAutoencoder


def test_a_small_latent_takes_noise_away(made, tmp_path):
    model, inputs, images = made
    result = latentae.denoise(model, inputs, tmp_path / "out", noise=0.5, seed=3)
    assert result["after"]["low"] > result["before"]["high"] + 0.5
    with (tmp_path / "out" / "psnr.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    clean = images[7, 0].double().numpy()
    for name, column in (("noisy", "before"), ("images", "after")):
        error = ((pixels(tmp_path / "out" / name / "0007.png") - clean) ** 2).mean()
        assert float(rows[7][column]) == pytest.approx(10 * np.log10(255**2 / error))
    with Image.open(tmp_path / "out" / "examples.png") as picture:
        assert picture.size == (8 * 132 + 4, 3 * 132 + 4)


def test_the_noise_of_an_image_depends_on_seed_and_key_alone(made, tmp_path):
    model, inputs, _ = made
    some = [inputs / f"{number:04}.png" for number in range(30)]
    latentae.denoise(model, some, tmp_path / "a", noise=0.3, batch_size=7)
    latentae.denoise(model, [inputs / "0021.png", inputs / "0003.png"], tmp_path / "b", noise=0.3)
    latentae.denoise(model, [inputs / "0003.png"], tmp_path / "c", noise=0.3, seed=1)
    one, same, other = (pixels(tmp_path / name / "noisy" / "0003.png") for name in "abc")
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
    assert pixels(tmp_path / "out" / "images" / "odd.png").shape == (13, 21)
    assert not (tmp_path / "out" / "noisy").exists()
    network = LinearAutoencoder.from_pretrained(model)
    with torch.no_grad():
        whole = network.decode(network.encode(images[:1].float() / 127.5 - 1).mode())
    expected = ((whole[0, 0].numpy() + 1) * 127.5).round().clip(0, 255)
    assert np.abs(pixels(tmp_path / "out" / "images" / "odd.png")[:8, :8] - expected).max() <= 1


@pytest.fixture
def model(digits, tmp_path):
    return pca_model(tmp_path / "model", digits[0][:200], 8)


def test_denoise_refuses_keys_of_several_shards_before_the_work(model, digits, tmp_path):
    for shard in ("a", "b"):
        write_shards(
            ({"__key__": str(n), "png": encode_png(digits[0][n])} for n in range(3)), tmp_path / shard
        )
    given = [tmp_path / "a" / "000000.tar", tmp_path / "b" / "000000.tar"]
    message = r"image 0 in .*a/000000\.tar and image 0 in .*b/000000\.tar would both be written to '0\.png'"
    with pytest.raises(OutputError, match=message):
        latentae.denoise(model, given, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    assert latentae.denoise(model, given[:1], tmp_path / "out", device="cpu")["images"] == 3


def test_denoise_refuses_names_that_are_too_long_before_the_work(model, digits, tmp_path):
    write_shards([{"__key__": "x" * 252, "png": encode_png(digits[0][0])}], tmp_path / "shards")
    with pytest.raises(OutputError, match="needs a file name of 256 bytes"):
        latentae.denoise(model, tmp_path / "shards", tmp_path / "out", device="cpu")

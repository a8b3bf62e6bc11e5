from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from digit_files import write_images
from safetensors.torch import load_file

import latentae
from latentae.errors import ImageError, ModelError, RecipeError
from latentae.models.linear import LinearAutoencoder


def test_features_are_the_latents_of_the_images_and_tell_digits_apart(made, tmp_path):
    model, inputs, images = made
    result = latentae.features(model, inputs, tmp_path / "out")
    features = load_file(tmp_path / "out" / "features-00000.safetensors")["features"]
    with torch.no_grad():
        expected = (
            LinearAutoencoder.from_pretrained(model)
            .encode(images.float() / 127.5 - 1)
            .mode()
            .mean(dim=(2, 3))
        )
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    with (tmp_path / "out" / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows[:2]] == ["0000", "0001"]
    assert (rows[-1]["file"], rows[-1]["row"]) == ("features-00000.safetensors", "149")
    probe = result["probe"]
    assert probe["tested_on"] + probe["trained_on"] == 150
    assert probe["accuracy"] > 0.7 > 0.35 > probe["most_frequent_class"]


def test_one_class_alone_has_no_probe(made, tmp_path):
    model, inputs, _ = made
    (tmp_path / "labels.csv").write_text("key,label\n0000,three\n0001,three\n")
    result = latentae.features(model, inputs, tmp_path / "out", labels=tmp_path / "labels.csv")
    assert "two classes" in result["probe"]["skipped"]
    assert latentae.features(model, inputs, tmp_path / "plain", labels="none")["probe"] is None


def test_spatial_features_as_npz_and_moments(made, tmp_path):
    model, inputs, _ = made
    assert latentae.features(model, inputs, tmp_path / "out", pool="spatial", format="npz", resolution=16)[
        "shape"
    ] == [12, 2, 2]
    with np.load(tmp_path / "out" / "features-00000.npz") as arrays:
        spatial, keys = torch.from_numpy(arrays["features"]), arrays["keys"]
    assert spatial.shape == (150, 12, 2, 2)
    assert keys[5] == "0005"
    latentae.features(model, inputs, tmp_path / "moments", pool="moments", resolution=16)
    moments = load_file(tmp_path / "moments" / "features-00000.safetensors")["features"]
    torch.testing.assert_close(moments[:, :12], spatial.mean(dim=(2, 3)))
    torch.testing.assert_close(moments[:, 12:], spatial.flatten(2).std(dim=2, correction=0))


def test_what_can_not_be_done_is_said(made, tmp_path):
    model, _, images = made
    mixed = write_images(tmp_path / "mixed", images[:2])
    big = torch.nn.functional.interpolate(images[:1].float(), size=(16, 24)).to(torch.uint8)
    write_images(tmp_path / "mixed" / "big", big)
    assert latentae.features(model, mixed, tmp_path / "pooled")["images"] == 3
    with pytest.raises(ImageError, match="give a resolution"):
        latentae.features(model, mixed, tmp_path / "spatial", pool="spatial")
    with pytest.raises(ImageError, match="multiple of 8; use 16"):
        latentae.features(model, mixed, tmp_path / "odd", resolution=15)
    with pytest.raises(RecipeError, match="pool is 'max', expected one of mean"):
        latentae.features(model, mixed, tmp_path / "pool", pool="max")
    with pytest.raises(ModelError):
        latentae.features(tmp_path / "mixed", mixed, tmp_path / "model")

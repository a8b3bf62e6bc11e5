from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import latentae
from latentae.errors import ImageError, ModelError, OutputError, RecipeError
from latentae.models.linear import LinearAutoencoder
from latentae.tasks import extracting


def _latents(model, images):
    """The plain way to the same numbers."""
    with torch.no_grad():
        return LinearAutoencoder.from_pretrained(model).encode(images.float() / 127.5 - 1).mode().mean(dim=(2, 3))


@pytest.fixture(scope="module")
def made(digits, pca_model, write_digits, tmp_path_factory):
    """A PCA of every second digit, and 300 of the others as files with classes."""
    folder = tmp_path_factory.mktemp("features")
    images, classes = digits
    model = pca_model(folder / "model", images[::2], 16)
    return model, write_digits(folder / "digits", images[1:601:2], classes[1:601:2].tolist()), images[1:601:2]


def test_features_are_the_latents_of_the_images_and_tell_digits_apart(made, tmp_path):
    model, inputs, images = made
    result = latentae.features(model, inputs, tmp_path / "out")
    features = load_file(tmp_path / "out" / "features-00000.safetensors")["features"]
    expected = _latents(model, images)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    with (tmp_path / "out" / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows[:2]] == ["0000", "0001"]
    assert (rows[-1]["file"], rows[-1]["row"]) == ("features-00000.safetensors", "299")
    probe = result["probe"]
    assert probe["tested_on"] + probe["trained_on"] == 300
    assert probe["accuracy"] > 0.85 > 0.3 > probe["most_frequent_class"]
    assert not (tmp_path / "out" / "parts").exists()


def test_one_class_alone_has_no_probe(made, tmp_path):
    model, inputs, _ = made
    (tmp_path / "labels.csv").write_text("key,label\n0000,three\n0001,three\n")
    result = latentae.features(model, inputs, tmp_path / "out", labels=tmp_path / "labels.csv")
    assert "two classes" in result["probe"]["skipped"]
    assert latentae.features(model, inputs, tmp_path / "plain", labels="none")["probe"] is None


def test_spatial_features_as_npz_and_moments(made, tmp_path):
    model, inputs, _ = made
    assert latentae.features(model, inputs, tmp_path / "out", pool="spatial", format="npz", resolution=16)["shape"] == [16, 2, 2]
    with np.load(tmp_path / "out" / "features-00000.npz") as arrays:
        spatial, keys = torch.from_numpy(arrays["features"]), arrays["keys"]
    assert spatial.shape == (300, 16, 2, 2)
    assert keys[5] == "0005"
    latentae.features(model, inputs, tmp_path / "moments", pool="moments", resolution=16)
    moments = load_file(tmp_path / "moments" / "features-00000.safetensors")["features"]
    torch.testing.assert_close(moments[:, :16], spatial.mean(dim=(2, 3)))
    torch.testing.assert_close(moments[:, 16:], spatial.flatten(2).std(dim=2, correction=0))


def test_a_broken_off_job_goes_on_and_a_finished_one_says_so(made, tmp_path, monkeypatch, capsys):
    model, inputs, _ = made
    monkeypatch.setitem(extracting.PART, "mean", 100)
    whole = latentae.features(model, inputs, tmp_path / "whole")
    made_parts = []
    make = extracting._Extraction.make

    def broken(self, part, numbers, progress):
        made_parts.append(part)
        if len(made_parts) == 3:
            raise KeyboardInterrupt
        return make(self, part, numbers, progress)

    monkeypatch.setattr(extracting._Extraction, "make", broken)
    with pytest.raises(KeyboardInterrupt):
        latentae.features(model, inputs, tmp_path / "out")
    assert latentae.features(model, inputs, tmp_path / "out") == whole
    assert made_parts == [0, 1, 2, 2]
    for name in ("index.csv", "summary.json", "features-00002.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    capsys.readouterr()
    assert (
        latentae.features(model, inputs, tmp_path / "out") == whole == json.loads((tmp_path / "out" / "summary.json").read_text())
    )
    assert "already holds" in capsys.readouterr().err
    with pytest.raises(OutputError, match="pool"):
        latentae.features(model, inputs, tmp_path / "out", pool="moments")


def test_what_can_not_be_done_is_said(made, digits, write_digits, tmp_path):
    model, _, images = made
    mixed = write_digits(tmp_path / "mixed", images[:2])
    big = torch.nn.functional.interpolate(images[:1].float(), size=(16, 24)).to(torch.uint8)
    write_digits(tmp_path / "mixed" / "big", big)
    assert latentae.features(model, mixed, tmp_path / "pooled")["images"] == 3
    with pytest.raises(ImageError, match="give a resolution"):
        latentae.features(model, mixed, tmp_path / "spatial", pool="spatial")
    with pytest.raises(ImageError, match="multiple of 8; use 16"):
        latentae.features(model, mixed, tmp_path / "odd", resolution=15)
    with pytest.raises(RecipeError, match="one of mean"):
        latentae.features(model, mixed, tmp_path / "pool", pool="max")
    with pytest.raises(ModelError):
        latentae.features(tmp_path / "mixed", mixed, tmp_path / "model")

from __future__ import annotations

import json

import pytest

import latentae
from latentae.errors import ImageError, RecipeError


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

"""Recipes of the family name their data themselves: `latentae train NAME --output RUN` is all it takes."""

from __future__ import annotations

import json

import pytest
import torch

from latentae.data.builtin import digits
from latentae.data.transforms import to_float
from latentae.errors import DataError
from latentae.models.pretrained import load_model
from latentae.training.rehearsal import rehearse
from latentae.training.train import train

pytest.importorskip("sklearn")
QUICK = {"images": 1280, "log.tensorboard": False, "log.summary": False, "log.validation_every_images": 1280}


def test_a_recipe_with_built_in_data_trains_validates_and_is_finished_once(tmp_path, capsys):
    run = train("linear-digits", tmp_path / "run", **QUICK)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("psnr" in key for line in lines for key in line), "the held-out digits were looked at"
    assert (tmp_path / "run-shards" / "index.json").is_file()
    assert json.loads((tmp_path / "run-held-out-shards" / "index.json").read_text())["samples"] == 360
    assert train("linear-digits", tmp_path / "run", **QUICK) == run
    assert "nothing to do" in "".join(capsys.readouterr())
    x = to_float(digits("held-out")[0])
    with torch.no_grad():
        model = load_model(tmp_path / "run")[0]
        assert (model.decode(model.encode(x).mean) - x).square().mean() < x.var()


def test_a_dry_run_of_built_in_data_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert rehearse("linear-digits", seconds=0.05, **QUICK).parts[0].images_per_second > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["data.shards", "data.validation"])
def test_a_name_that_is_none_is_refused(tmp_path, key):
    with pytest.raises(DataError, match="sklearn:digit is no built-in set"):
        train("linear-digits", tmp_path / "run", **QUICK, **{key: "sklearn:digit"})
    assert not (tmp_path / "run").exists()

"""The quickstart on a few photos, with a few training steps."""

from __future__ import annotations

import re
import warnings
from functools import partial

import pytest

from latentae import cli
from latentae.data.builtin import TRAINING
from latentae.errors import OutputError, RecipeError
from latentae.examples.quickstart import quickstart
from latentae.files import read_json
from latentae.training.dry_run import measure_speed


@pytest.mark.slow
def test_from_photos_to_diffusers(tmp_path, monkeypatch, capsys):
    for package in ("skimage", "sklearn", "diffusers"):
        pytest.importorskip(package)
    monkeypatch.setattr("latentae.examples.quickstart.TRAINING", TRAINING[:3])
    monkeypatch.setattr("latentae.examples.quickstart.TRAINING_STRIDE", 256)
    monkeypatch.setattr(
        "latentae.examples.quickstart.measure_speed", partial(measure_speed, seconds=0.1, warmup_steps=1)
    )
    out = tmp_path / "quickstart"
    plans = []
    for _ in range(2):
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
            warnings.simplefilter("ignore")  # a command that warns does not fail
            cli.main(["quickstart", "--out", str(out), "--minutes", "0.002"])
        assert not stop.value.code
        plans.append(read_json(out / "plan.json"))
    assert "is finished" in capsys.readouterr().err
    assert plans[0] == plans[1]
    assert plans[0]["images_per_second"] > 0
    metrics = read_json(out / "evaluation" / "metrics.json")
    assert metrics["data"]["images"] > 40
    assert {"pca", "jpeg", "latent_8bit"} <= set(metrics["baselines"])
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href)="https?:', page)
    assert "Held out, never seen in training: chelsea, china, coffee" in page
    for link in re.findall(r'href="([^"#:]+)"', page):
        assert (out / link).is_file(), link
    record = read_json(out / "latentae.json")
    assert record["finished"]
    assert record["largest_difference_to_diffusers"] <= 1e-5
    with pytest.raises(OutputError, match="holds another quickstart job"):
        quickstart(out, minutes=1.0)


@pytest.mark.parametrize("wrong", [{"minutes": 0}, {"minutes": -1}, {"minutes": float("nan")}, {"images": 0}])
def test_no_time_is_refused_before_anything_is_written(wrong, tmp_path):
    with pytest.raises(RecipeError, match=r"expected (above 0|1 or more|a finite)"):
        quickstart(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()

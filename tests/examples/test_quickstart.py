"""The main job on real photos, shortened to a few training steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from latentae.errors import OutputError, RecipeError
from latentae.examples.quickstart import quickstart


@pytest.mark.slow
def test_the_whole_line_from_photos_to_diffusers(tmp_path):
    out = tmp_path / "quickstart"
    command = [sys.executable, "-m", "latentae", "quickstart", "--out", str(out), "--minutes", "0.02"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    plan = json.loads((out / "plan.json").read_text())
    assert plan["images_per_second"] > 0
    metrics = json.loads((out / "evaluation" / "metrics.json").read_text())
    assert metrics["data"]["images"] > 40
    assert {"pca", "jpeg", "latent_8bit"} <= set(metrics["baselines"])
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href)="https?:', page)
    assert "Held out, never seen in training: chelsea, china, coffee" in page
    for link in re.findall(r'href="([^"#:]+)"', page):
        assert (out / link).is_file(), link
    record = json.loads((out / "latentae.json").read_text())
    assert record["finished"]
    assert record["largest_difference_to_diffusers"] <= 1e-5

    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0
    assert "is finished" in again.stderr
    assert json.loads((out / "plan.json").read_text()) == plan
    with pytest.raises(OutputError, match="holds another quickstart job"):
        quickstart(out, minutes=1.0)


@pytest.mark.parametrize("wrong", [{"minutes": 0}, {"minutes": -1}, {"minutes": float("nan")}, {"images": 0}])
def test_no_time_is_refused_before_anything_is_written(wrong, tmp_path):
    with pytest.raises(RecipeError, match="positive"):
        quickstart(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

import latentae
from latentae.errors import OutputError
from latentae.files import write_json
from latentae.tasks import anomaly, denoise, features, outputs
from latentae.tasks.outputs import heat_picture

VERBS = {
    "features": (latentae.features, {"pool": "moments"}),
    "denoise": (latentae.denoise, {"noise": 0.3}),
    "anomaly": (partial(latentae.anomaly, heat_maps=3), {"quantile": 0.9}),
}


@pytest.mark.parametrize("verb", list(VERBS))
def test_an_interrupted_job_resumes_and_repeats_no_part(made, tmp_path, monkeypatch, capsys, verb):
    model, inputs, _ = made
    function, other = VERBS[verb]
    folders = (inputs, inputs) if verb == "anomaly" else (inputs,)
    monkeypatch.setattr(anomaly, "PART", 60)
    monkeypatch.setattr(denoise, "PART", 60)
    monkeypatch.setitem(features.PART, "mean", 60)
    finished: list[str] = []

    def write(file, rows):
        if stop and finished == ["00000.json"]:
            raise KeyboardInterrupt
        if file.parent.name == "parts":
            finished.append(file.name)
        write_json(file, rows)

    complete = function(model, *folders, tmp_path / "complete")
    stop = True
    monkeypatch.setattr(outputs, "write_json", write)
    with pytest.raises(KeyboardInterrupt):
        function(model, *folders, tmp_path / "out")
    stop = False
    monkeypatch.setattr(anomaly, "Moments", None)  # normal images are not measured again
    assert function(model, *folders, tmp_path / "out") == complete
    assert finished == ["00000.json", "00001.json", "00002.json"]
    for path in (tmp_path / "complete").rglob("*.*"):
        assert (
            tmp_path / "out" / path.relative_to(tmp_path / "complete")
        ).read_bytes() == path.read_bytes(), path.name
    assert not (tmp_path / "out" / "parts").exists()
    capsys.readouterr()
    assert (
        function(model, *folders, tmp_path / "out")
        == json.loads((tmp_path / "out" / "summary.json").read_text())
        == complete
    )
    assert "already holds" in capsys.readouterr().err
    with pytest.raises(OutputError, match=next(iter(other))):
        function(model, *folders, tmp_path / "out", **other)


def test_heat_runs_from_black_to_yellow():
    picture = heat_picture(torch.tensor([[-1.0, 0.0, 0.5, 1.0, 9.0]]))
    assert picture[:, 0, 0].tolist() == picture[:, 0, 1].tolist() == [0, 0, 3]
    light = picture[:, 0].float().mean(0)
    assert light[1] < light[2] < light[3] == light[4]

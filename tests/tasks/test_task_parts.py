from __future__ import annotations

import json
from functools import partial

import pytest

import latentae
from latentae.errors import OutputError
from latentae.files import write_json
from latentae.tasks import anomaly, denoise, features, parts

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

    whole = function(model, *folders, tmp_path / "whole")
    stop = True
    monkeypatch.setattr(parts, "write_json", write)
    with pytest.raises(KeyboardInterrupt):
        function(model, *folders, tmp_path / "out")
    stop = False
    monkeypatch.setattr(anomaly, "Moments", None)  # normal images are not measured again
    assert function(model, *folders, tmp_path / "out") == whole
    assert finished == ["00000.json", "00001.json", "00002.json"]
    for path in (tmp_path / "whole").rglob("*.*"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes(), (
            path.name
        )
    assert not (tmp_path / "out" / "parts").exists()
    capsys.readouterr()
    assert (
        function(model, *folders, tmp_path / "out")
        == json.loads((tmp_path / "out" / "summary.json").read_text())
        == whole
    )
    assert "already holds" in capsys.readouterr().err
    with pytest.raises(OutputError, match=next(iter(other))):
        function(model, *folders, tmp_path / "out", **other)

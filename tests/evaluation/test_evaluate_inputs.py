"""Unusual inputs: sizes, depths, channels, damage, other models, several processes."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from latentae.data.shards import shards
from latentae.errors import ImageError, ModelError, RecipeError
from latentae.evaluation.evaluate import evaluate
from latentae.evaluation.measurement import Measurement
from latentae.models.config import LinearAutoencoderConfig
from latentae.models.linear import LinearAutoencoder

FEW = {"perceptual": "none", "frechet": "none", "details": False}


def test_unlike_images_are_evaluated_and_said(workspace, tmp_path, smooth_images):
    folder = tmp_path / "images"
    folder.mkdir()
    color = smooth_images(3, 64).permute(0, 2, 3, 1).numpy()
    Image.fromarray(color[0]).save(folder / "a.png")
    Image.fromarray(color[1, :20, :40]).save(folder / "b-small.png")
    Image.fromarray(color[2, :, :, 0]).save(folder / "c-gray.png")
    Image.fromarray(color[0, :, :40, 1].astype(np.uint16) * 257).save(folder / "d-16-bit.png")
    shards(folder, tmp_path / "shards")
    result = evaluate(workspace / "model", tmp_path / "shards", out=tmp_path / "out", **FEW)
    data = result["data"]
    assert (data["images"], data["enlarged"], data["gray"], data["sixteen_bit"]) == (4, 1, 2, 1)
    texts = " ".join(found["text"] for found in result["findings"])
    for text in ("smaller than 32 pixels", "stored as gray", "more than 8 bits"):
        assert text in texts
        assert text in (tmp_path / "out" / "report.html").read_text()


def damaged(tmp_path, smooth_images, write_images, bad):
    """A shard of four images, the second cut short after it was packed."""
    folder = write_images(tmp_path / "images", smooth_images(4, 48))
    shards(folder, tmp_path / "shards")
    (shard,) = (tmp_path / "shards").glob("*.tar")
    data = bytearray(shard.read_bytes())
    at, count = -1, 0
    while (at := data.find(b"IDAT", at + 1)) >= 0:
        if count in bad:
            data[at + 4 : at + 40] = bytes(36)
        count += 1
    shard.write_bytes(data)
    return tmp_path / "shards"


def test_a_damaged_image_is_left_out_and_named(workspace, tmp_path, smooth_images, write_images):
    result = evaluate(
        workspace / "model", damaged(tmp_path, smooth_images, write_images, {1}), out=tmp_path / "out", **FEW
    )
    assert result["data"]["images"] == result["metrics"]["psnr"]["n"] == 3
    assert result["data"]["skipped_count"] == 1
    assert result["data"]["skipped"][0]["key"] == "001"
    assert any(
        found["kind"] == "bad" and "1 image could not be read" in found["text"]
        for found in result["findings"]
    )
    rows = list(csv.DictReader((tmp_path / "out" / "per_image.csv").read_text().splitlines()))
    assert [row["key"] for row in rows] == ["000", "002", "003"]
    nothing = damaged(tmp_path / "all", smooth_images, write_images, range(4))
    with pytest.raises(ImageError, match=r"none of 4 images can be evaluated; the first: .*000"):
        evaluate(workspace / "model", nothing, out=tmp_path / "none", **FEW)
    assert not (tmp_path / "none" / "metrics.json").exists()


@pytest.mark.parametrize(("channels", "missing"), [(1, set()), (4, {"jpeg"})])
def test_gray_and_transparent_models(workspace, tmp_path, tiny_model, channels, missing):
    tiny_model(in_channels=channels, out_channels=channels).save_pretrained(tmp_path / "model")
    arguments = {"pca_shards": workspace / "training", "out": tmp_path / "out"}
    result = evaluate(tmp_path / "model", workspace / "held_out", frechet="none", details=False, **arguments)
    assert result["data"]["channels"] == channels
    assert result["metrics"]["psnr"]["n"] == 5
    assert {name for name, method in result["baselines"].items() if "missing" in method} & {
        "pca",
        "dct",
        "jpeg",
    } == missing
    assert result["metrics"].get("perceptual", {"n": 5})["n"] == 5  # none where no weights are installed
    for example in result["examples"]:
        assert (tmp_path / "out" / example["files"]["original"]).is_file()


def test_a_model_that_is_exact(workspace, tmp_path):
    model = LinearAutoencoder(LinearAutoencoderConfig(patch=2, latent_channels=12, sample_size=32))
    with torch.no_grad():
        model.encoder.weight.copy_(torch.eye(12).reshape(12, 3, 2, 2))
        torch.nn.init.zeros_(model.encoder.bias)  # pyright: ignore[reportArgumentType]
    model.save_pretrained(tmp_path / "model")
    result = evaluate(tmp_path / "model", workspace / "held_out", out=tmp_path / "out", **FEW)
    assert result["metrics"]["psnr"]["mean"] is None
    assert result["metrics"]["psnr"]["infinite"] == 5
    assert result["metrics"]["ssim"]["mean"] == pytest.approx(1)
    json.loads((tmp_path / "out" / "metrics.json").read_text(), parse_constant=pytest.fail)


def test_other_models_are_measured_on_the_same_images(workspace, tmp_path, tiny_model):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    shape = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    tiny = diffusers.AutoencoderTiny(**shape, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    tiny.save_pretrained(tmp_path / "x" / "model")
    out, others = tmp_path / "out", [tmp_path / "x" / "model", workspace / "model"]
    result = evaluate(
        workspace / "model",
        workspace / "held_out",
        compare=others,
        out=out,
        frechet="none",
        perceptual="none",
    )
    theirs, same = result["compared"]
    assert theirs["name"] != same["name"]
    assert theirs["latent"] == {"shape": [4, 16, 16], "floats_per_pixel": 1.0}
    assert same["metrics"] == result["metrics"]
    assert same["paired"]["psnr"]["mean"] == 0
    assert same["bytes_per_image"] == result["baselines"]["latent_8bit"]["bytes_per_image"]
    rows = list(csv.DictReader((out / "per_image.csv").read_text().splitlines()))
    assert np.mean([float(row[f"{theirs['name']}_psnr"]) for row in rows]) == pytest.approx(
        theirs["metrics"]["psnr"]["mean"]
    )
    alone = evaluate(tmp_path / "x" / "model", workspace / "held_out", resolution=32, **FEW)
    assert alone["metrics"]["psnr"] == theirs["metrics"]["psnr"]
    assert {curve["name"] for curve in result["rate_distortion"]["curves"]} >= {
        "model",
        theirs["name"],
        "jpeg",
        "webp",
    }
    tiny_model(in_channels=1, out_channels=1).save_pretrained(tmp_path / "gray")
    with pytest.raises(ModelError, match="1 channels in"):
        evaluate(workspace / "model", workspace / "held_out", compare=[tmp_path / "gray"])
    with pytest.raises(ImageError, match=r"resolution is 30, .* needs a multiple of 4"):
        evaluate(
            tmp_path / "x" / "model", workspace / "held_out", resolution=30, compare=[workspace / "model"]
        )


def test_three_processes_give_the_numbers_of_one_even_if_one_of_them_breaks_off(
    workspace, tmp_path, smooth_images, write_images, monkeypatch
):
    shards(
        write_images(tmp_path / "images", smooth_images(40, 32, seed=5)), tmp_path / "shards", shard_size=15
    )

    def process(rank, tasks, out):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(tasks))
        return evaluate(
            workspace / "model", tmp_path / "shards", out=out, pca_shards=workspace / "training", **FEW
        )

    with pytest.raises(RecipeError, match="give one with --out"):
        process(0, 3, None)
    one = process(0, 1, tmp_path / "one")
    save, saved = Measurement.save, []

    def broken(chunk, path):
        saved.append(path.name)
        if path.name == "001.npz":
            raise KeyboardInterrupt
        save(chunk, path)

    monkeypatch.setattr(Measurement, "save", broken)
    assert process(0, 3, tmp_path / "three") == {}  # others are still at it
    with pytest.raises(KeyboardInterrupt):
        process(1, 3, tmp_path / "three")
    assert process(2, 3, tmp_path / "three") == {}
    monkeypatch.setattr(Measurement, "save", lambda chunk, path: (saved.append(path.name), save(chunk, path)))
    assert process(1, 3, tmp_path / "three") == one
    assert sorted(saved) == ["000.npz", "001.npz", "001.npz", "002.npz"]
    for file in ("metrics.json", "per_image.csv"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "three" / file).read_bytes()
    assert one["data"]["images"] == 40
    assert not (tmp_path / "three" / "parts").exists()

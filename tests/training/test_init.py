"""A run that begins at PCA of its training crops, and the verb `init`."""

from __future__ import annotations

import json

import pytest
import torch

from latentae.data.transforms import to_float, to_uint8
from latentae.errors import DataError, OutputError, RecipeError
from latentae.measures.metrics import psnr
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.weight_files import read_tensors
from latentae.training.init import fit_head_start, init
from latentae.training.recipe import load_recipe
from latentae.training.train import train


@pytest.fixture(autouse=True)
def _few_patches(monkeypatch):
    monkeypatch.setattr("latentae.training.init.PATCHES", 4000)


def checkpoints(run):
    return sorted((run / "checkpoints").glob("step-*"))


def images_of(recipe):
    return torch.cat(fit_head_start(recipe).images[:2])


@torch.no_grad()
def distance(model, images):
    return (
        psnr(images, to_uint8(model.eval()(to_float(images), sample_posterior=False).reconstruction))
        .mean()
        .item()
    )


def test_a_run_begins_at_pca_and_says_so_and_a_resumed_one_fits_nothing(
    narrow, tmp_path, monkeypatch, capsys
):
    run = train(narrow(), tmp_path / "run")
    said = capsys.readouterr().err
    assert "4 components keep" in said
    pca = float(said.split("before the first step: PCA ")[1].split()[0])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "validation/psnr" in line)
    assert first["images"] == 0
    assert first["validation/psnr"] == pytest.approx(pca, abs=0.1)
    assert (run / "samples" / "000000000.png").is_file()
    # a resumed run takes its weights from the checkpoint
    monkeypatch.setattr("latentae.training.init.fit_head_start", lambda recipe: pytest.fail("fitted again"))
    on = train(narrow(), tmp_path / "on", resume=checkpoints(run)[0])
    assert (checkpoints(on)[-1] / "ema.safetensors").read_bytes() == (
        checkpoints(run)[-1] / "ema.safetensors"
    ).read_bytes()


def test_a_posterior_begins_at_the_log_variance_that_is_asked_for(narrow):
    options = narrow(**{"model.bottleneck": "gaussian", "model.initial_logvar": -5.0})
    model = fit_head_start(options).build(options)
    posterior = model.encode(to_float(images_of(options)))
    assert posterior.logvar.unique().tolist() == [-5.0]
    assert posterior.mean.std((0, 2, 3)).sub(1).abs().max() < 0.3


def test_a_frozen_trunk_stays_where_it_began(narrow, tmp_path):
    options = narrow(
        images=8, **{"optimizer.trunk_lr_ratio": 0.0, "optimizer.lr": 1e-2, "data.validation": "none"}
    )
    run = train(options, tmp_path / "run")
    start = fit_head_start(options).build(options).state_dict()
    end = read_tensors(checkpoints(run)[-1] / "autoencoder.safetensors")
    changed = {name for name, value in start.items() if not torch.equal(value, end[name])}
    assert changed
    assert all(".conv1." in name or ".conv2." in name or ".norm." in name for name in changed), changed


def test_init_writes_a_model_that_everything_loads(narrow, tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    options = narrow()
    report = init(options, str(options.data.shards), tmp_path / "start")
    assert report["psnr"] == pytest.approx(report["pca_psnr"], abs=0.1)
    assert 0.5 < report["explained"] <= 1
    ours = AutoencoderDC.from_pretrained(tmp_path / "start")
    images = images_of(options)
    theirs = diffusers.AutoencoderDC.from_pretrained(tmp_path / "start").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(to_float(images)).sample, ours.eval()(to_float(images)).reconstruction, atol=1e-5, rtol=0
        )
    capsys.readouterr()
    assert init(options, str(options.data.shards), tmp_path / "start") == report
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(OutputError, match="holds another"):
        init(narrow(seed=1), str(options.data.shards), tmp_path / "start")
    # and a training may begin with it, as it does with any model
    run = train(
        narrow(**{"model.init_from": str(tmp_path / "start"), "images": 4, "optimizer.lr": 1e-9}),
        tmp_path / "run",
    )
    assert distance(AutoencoderDC.from_pretrained(run), images) == pytest.approx(
        distance(ours, images), abs=0.01
    )


def test_images_of_several_shapes_are_cut_to_whole_patches(narrow):
    options = narrow(
        **{"data.buckets": "auto", "data.resolution": 36, "data.bucket_step": 12, "batch_size": 1}
    )
    start = fit_head_start(options)
    assert {(images.shape[2] % 8, images.shape[3] % 8) for images in start.images} == {(0, 0)}
    assert start.build(options).config.latent_channels == 4


def test_what_cannot_begin_there_is_refused_in_one_line(narrow, shards, tmp_path):
    wide = narrow(**{"model.latent_channels": 384, "model.block_out_channels": [96, 192, 384, 384]})
    with pytest.raises(RecipeError, match="only an AutoencoderDC can start there"):
        load_recipe("kl-f8", {"model.initialization": "pca"})
    for asked, error, message in (
        ("tiny-cpu", RecipeError, "only an AutoencoderDC"),
        (narrow(**{"model.init_from": str(tmp_path)}), RecipeError, "init starts at PCA"),
        (wide, DataError, "192 principal components, fewer than the 384"),
    ):
        with pytest.raises(error, match=message):
            init(asked, str(shards), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()

"""The verb: run folders, resuming, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from forked import Processes
from PIL import Image
from safetensors.torch import load_file

import latentae
from latentae import cli
from latentae.data.builtin import digits
from latentae.data.transforms import to_float
from latentae.errors import DataError, ModelError, OutputError, RecipeError, TrainingError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.pretrained import load_model
from latentae.training.checkpoint import find_checkpoint
from latentae.training.dry_run import dry_run
from latentae.training.recipe import Recipe
from latentae.training.steps import build_discriminator

GAME = {"loss.adversarial.weight": 0.1, "loss.adversarial.channels": 8, "loss.adversarial.layers": 2}


def weights(run):
    return (find_checkpoint(run) / "autoencoder.safetensors").read_bytes()


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_has_everything_and_says_when_it_is_finished(small, tmp_path, capsys):
    validated = {
        "data.validation": "auto",
        "data.validation_fraction": 0.2,
        "log.tensorboard": True,
        "log.summary": True,
    }
    run = latentae.train(small(**validated), tmp_path / "run")
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoints", "events.jsonl", "latentae.json", "metrics.jsonl", "recipe.toml", "samples",
        "summary.html", "tensorboard",
    ]  # fmt: skip
    last = lines(run)[-1]
    assert last["images"] == 24
    assert last["validation/psnr"] > 5
    with Image.open(sorted((run / "samples").iterdir())[-1]) as picture:
        assert picture.size[0] > 32
    assert list((run / "tensorboard").glob("events*"))
    before = weights(run)
    capsys.readouterr()
    latentae.train(small(**validated), tmp_path / "run")
    assert "is finished" in capsys.readouterr().err
    assert weights(run) == before


def test_ctrl_c_saves_and_the_same_command_goes_on(small, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(small(images=4000).toml())
    command = [sys.executable, "-m", "latentae", "train", str(recipe), "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not find_checkpoint(tmp_path / "run") and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130, error
    assert "run the same command again to resume" in error
    assert "Traceback" not in error
    step = json.loads((find_checkpoint(tmp_path / "run") / "state.json").read_text())["images_seen"]
    assert 8 <= step < 4000
    assert str(step) in error


def test_other_jobs_and_other_folders_are_refused(small, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    with pytest.raises(OutputError, match=r"recipe.optimizer.lr was 0.003 and is now 0.002"):
        latentae.train(small(**{"optimizer.lr": 2e-3}), tmp_path / "run")
    with pytest.raises(OutputError, match="--resume is never"):
        latentae.train(small(), tmp_path / "run", resume="never")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holiday\.txt"):
        latentae.train(small(), tmp_path / "photos")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["holiday.txt"]


def test_resume_path_goes_on_in_a_new_folder_with_another_length(small, whole_run, tmp_path):
    latentae.train(small(images=32), tmp_path / "second", resume=whole_run)
    assert lines(tmp_path / "second")[0]["images"] == 28
    with pytest.raises(TrainingError, match="has no checkpoint"):
        latentae.train(small(), tmp_path / "third", resume=tmp_path)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"data.resolution": 30}, RecipeError, "not a multiple of the model's downsampling 4; use 28"),
        (
            {"loss.adversarial.weight": 1, "loss.adversarial.layers": 4},
            RecipeError,
            "below the 48 pixels that the discriminator",
        ),
        ({"gradient_accumulation": 3}, RecipeError, "use a multiple of 3"),
        ({"batch_size": 100}, DataError, "one batch over all ranks takes 100"),
        ({"data.shards": "nowhere"}, DataError, "nowhere"),
    ],
)
def test_what_can_not_work_is_said_before_anything_is_written(small, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message) as caught:
        latentae.train(small(**overrides), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_no_data_option_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"--data\.shards"):
        latentae.train("tiny-cpu", tmp_path / "run")


def test_training_straight_from_a_folder_of_images(small, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(6):
        Image.effect_noise((40, 40), 50 + index).convert("RGB").save(folder / f"{index}.png")
    for _ in range(2):
        latentae.train(small(images=8, **{"data.shards": str(folder)}), tmp_path / "run")
        assert (tmp_path / "run-shards" / "000000.tar").is_file()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no \.tar shards; no image under .*it is empty"):
        latentae.train(small(**{"data.shards": str(tmp_path / "empty")}), tmp_path / "other")


def command_line(*words):
    cli.main(list(words))


def test_two_processes_go_on_with_the_run_of_one(small, tmp_path):
    """The same batches and noise give the same weights, except for the order of sums."""
    options = {"data.validation": "auto", "data.validation_fraction": 0.2, **GAME}
    whole = latentae.train(small(keep_checkpoints=9, **options), tmp_path / "whole")
    begun = whole / "checkpoints" / "step-00000002"
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(small(**options).toml())
    processes = Processes(
        tmp_path,
        command_line,
        "train",
        str(recipe),
        "--output",
        str(run),
        "--resume",
        str(begun),
        "--data.workers",
        "1",
        count=2,
    )
    assert processes.wait() == [0, 0], processes.output() + processes.output(1)
    said = processes.output()
    assert "2 processes" in said
    assert (said + processes.output(1)).count("model: ") == 1
    assert "at image 8 of 24" in said
    assert [line["images"] for line in lines(run) if "loss/total" in line] == [12, 16, 20, 24]
    folders = begun, find_checkpoint(run), find_checkpoint(whole)
    start, found, expected = (load_file(folder / "autoencoder.safetensors") for folder in folders)
    moved = sum((expected[name] - start[name]).square().sum() for name in start).sqrt()
    apart = sum((expected[name] - found[name]).square().sum() for name in start).sqrt()
    assert apart < 0.05 * moved, "other batches or other noise would lead elsewhere"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_start_two_processes_that_write_one_run(launcher, small, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(small(images=8).toml())
    start = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
                       "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"],
    }[launcher]  # fmt: skip
    # --multi_gpu only makes `accelerate launch` go through torchrun; its --cpu starts one process
    # for any number of them
    command = [
        sys.executable,
        "-m",
        *start,
        "-m",
        "latentae",
        "train",
        str(recipe),
        "--output",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stderr
    assert done.stderr.count("model: ") == 1
    assert [line["images"] for line in lines(tmp_path / "run")] == [4, 8]


def test_an_error_of_the_first_process_ends_all(small, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(small(**{"data.shards": str(tmp_path / "nowhere")}).toml())
    processes = Processes(
        tmp_path, command_line, "train", str(recipe), "--output", str(tmp_path / "run"), count=2
    )
    assert processes.wait() == [1, 1]
    assert "latentae: error: no shard" in processes.output()


def test_bf16_trains_and_keeps_fp32_weights(small, tmp_path):
    run = latentae.train(small(precision="bf16", images=8, **GAME), tmp_path / "run")
    state = load_file(find_checkpoint(run) / "autoencoder.safetensors")
    assert {str(v.dtype) for v in state.values()} == {"torch.float32"}
    assert all(line["loss/total"] < 10 for line in lines(run))


PHASES = [
    {"name": "small", "images": 12, "data": {"resolution": 16}},
    {
        "name": "large, decoder only, with a judge",
        "images": 12,
        "data": {"resolution": 32},
        "model": {"train": "decoder"},
        "loss": {"adversarial": {"weight": 0.1, "channels": 8, "layers": 2}},
    },
]


@pytest.fixture(scope="module")
def phased(small):
    recipe = small(keep_checkpoints=9, checkpoint_every_images=4)
    return Recipe(**{**recipe.model_dump(mode="json", exclude={"images", "phases"}), "phases": PHASES})


@pytest.fixture(scope="module")
def phased_run(phased, tmp_path_factory):
    return latentae.train(phased, tmp_path_factory.mktemp("phases") / "run")


def test_phases_follow_each_other_on_the_same_weights(phased_run):
    state = json.loads((find_checkpoint(phased_run) / "state.json").read_text())
    assert (state["phase"], state["phase_images"], state["images_seen"], state["step"]) == (1, 12, 24, 6)
    first = AutoencoderKL.from_pretrained(phased_run / "checkpoints" / "step-00000003", weights="raw")
    last = AutoencoderKL.from_pretrained(phased_run, weights="raw")
    for name, value in last.state_dict().items():
        same = torch.equal(value, first.state_dict()[name])
        assert same == name.startswith(("encoder", "quant_conv")), (
            f"the second phase trains the decoder alone: {name}"
        )


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_run_cut_inside_or_between_phases_goes_on_bitwise(step, phased, phased_run, tmp_path, capsys):
    checkpoint = phased_run / "checkpoints" / f"step-{step:08}"
    assert weights(latentae.train(phased, tmp_path / "on", resume=checkpoint)) == weights(phased_run)
    said = capsys.readouterr().err
    assert 'phase 0 "small": 12 images = 3 steps of 4, 16 px' in said
    assert ("phase 1 of 2" in said) == (step == 2), "said as it begins"


def test_training_begins_with_given_weights(small, whole_run, tmp_path):
    exported = tmp_path / "exported"
    AutoencoderKL.from_pretrained(whole_run).save_pretrained(exported)
    recipe = small(images=8, **{"model.preset": "init", "model.train": "decoder", "loss.kl": 0.0})
    tuned = latentae.train(recipe, tmp_path / "tuned", init_from=exported)
    a, b = AutoencoderKL.from_pretrained(whole_run), AutoencoderKL.from_pretrained(tuned)
    changed = {
        name.split(".")[0]
        for name, value in a.state_dict().items()
        if not torch.equal(value, b.state_dict()[name])
    }
    assert changed == {"post_quant_conv", "decoder"}
    with pytest.raises(
        OutputError, match="init_fingerprint"
    ):  # the same command with other weights is another job
        AutoencoderKL.from_pretrained(tuned).save_pretrained(exported)
        latentae.train(recipe, tmp_path / "tuned", init_from=exported)


def test_a_discriminator_comes_along_if_it_fits(small, tmp_path):
    first = latentae.train(small(images=4, **GAME), tmp_path / "first")
    stored = load_file(find_checkpoint(first) / "discriminator.safetensors")
    for choice, same in (("auto", True), ("yes", True), ("no", False)):
        recipe = small(**GAME, **{"model.init_from": str(first), "model.init_discriminator": choice})
        network = build_discriminator(recipe).state_dict()
        assert all(torch.equal(network[name], value) for name, value in stored.items()) == same, choice
    other = {**GAME, "loss.adversarial.channels": 12, "model.init_from": str(first)}
    assert build_discriminator(small(**other)) is not None
    with pytest.raises(ModelError, match="init-discriminator no starts a new one"):
        build_discriminator(small(**other, **{"model.init_discriminator": "yes"}))


DIGITS = {"images": 1280, "log.tensorboard": False, "log.summary": False, "log.validation_every_images": 1280}


def test_a_recipe_with_built_in_data_trains_validates_and_is_finished_once(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.chdir(tmp_path)
    dry_run("linear-digits", seconds=0, **DIGITS)
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"
    for name in ("data.shards", "data.validation"):
        with pytest.raises(DataError, match="sklearn:digit is no built-in set"):
            latentae.train("linear-digits", tmp_path / "run", **DIGITS, **{name: "sklearn:digit"})
        assert not (tmp_path / "run").exists()
    run = latentae.train("linear-digits", tmp_path / "run", **DIGITS)
    assert any("psnr" in key for line in lines(run) for key in line), "the held-out digits were validated"
    assert (tmp_path / "run-shards" / "index.json").is_file()
    assert json.loads((tmp_path / "run-held-out-shards" / "index.json").read_text())["samples"] == 360
    assert latentae.train("linear-digits", tmp_path / "run", **DIGITS) == run
    assert "nothing to do" in "".join(capsys.readouterr())
    x = to_float(digits("held-out")[0])
    with torch.no_grad():
        model = load_model(run)[0]
        assert (model.decode(model.encode(x).mean) - x).square().mean() < x.var()

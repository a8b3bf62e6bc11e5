"""Logs of a run: complete lines, none twice, and one Weights & Biases run over resumes."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentae.errors import MissingDependencyError, OutputError
from latentae.training.options import LogOptions
from latentae.training.reporting import MetricsLog, check_wandb, devices, peak_memory_gb, read_lines

PLAIN = LogOptions(tensorboard=False)


@pytest.fixture
def recipe(small):
    return small(images=100)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_holds_step_images_and_every_value(recipe, tmp_path):
    with MetricsLog(tmp_path, 0, PLAIN, recipe) as log:
        log.write(1, 8, {"loss/total": 0.5, "loss/kl": math.nan, "validation/psnr": math.inf})
        assert lines(tmp_path / "metrics.jsonl") == [  # readable at once, not when the run ends
            {"step": 1, "images": 8, "loss/total": 0.5, "loss/kl": None, "validation/psnr": None}
        ]
        log.event(2, 16, "warning", "ein „Umlaut“: ü")
    assert lines(tmp_path / "events.jsonl") == [
        {"step": 2, "images": 16, "kind": "warning", "message": "ein „Umlaut“: ü"}
    ]
    assert not (tmp_path / "tensorboard").exists()


def test_a_resumed_run_drops_the_lines_of_the_earlier_try(recipe, tmp_path):
    assert read_lines(tmp_path / "metrics.jsonl") == []
    with MetricsLog(tmp_path, 0, PLAIN, recipe) as log:
        for step in range(1, 6):
            log.write(step, 8 * step, {"loss/total": float(step)})
            log.event(step, 8 * step, "warning", f"at {step}")
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write(
                '[1]\n{"images": 3}\n{"step": 2, "ima'
            )  # no lines of ours, and one cut short by a kill
    with MetricsLog(tmp_path, 3, PLAIN, recipe) as log:
        assert [line["step"] for line in log.kept] == [1, 2, 3]
        log.write(4, 32, {"loss/total": 4.5})
    points = [(line["step"], line["loss/total"]) for line in lines(tmp_path / "metrics.jsonl")]
    assert points == [(1, 1), (2, 2), (3, 3), (4, 4.5)]
    assert [line["message"] for line in lines(tmp_path / "events.jsonl")] == ["at 1", "at 2", "at 3"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(recipe, tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        MetricsLog(tmp_path, 0, PLAIN, recipe) as log,
        pytest.raises(
            OutputError,
            match=r"metrics\.jsonl: No space left.*free the space.*run the same command again to resume",
        ),
    ):
        log.write(1, 8, {"loss/total": 1.0})


def test_half_a_line_is_an_error(recipe, tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, 0, PLAIN, recipe)
    monkeypatch.setattr(
        Path,
        "open",
        lambda *rest, **more: contextlib.nullcontext(types.SimpleNamespace(write=lambda data: 3)),
    )
    with pytest.raises(OutputError, match="only a part of a line"):
        log.write(1, 8, {"loss/total": 1.0})


def test_tensorboard_shows_each_point_once(recipe, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = LogOptions()
    with MetricsLog(tmp_path, 0, options, recipe) as log:
        for step in (1, 2, 3, 4):
            log.write(step, 8 * step, {"loss/total": float(step)})
        log.picture(32, Image.fromarray(np.zeros((4, 4, 3), np.uint8)))
    with MetricsLog(tmp_path, 2, options, recipe) as log:
        log.write(3, 24, {"loss/total": 30.0})
    with MetricsLog(tmp_path, 3, options, recipe) as log:
        log.write(4, 32, {"loss/total": 40.0})
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss/total")] == [
        (8, 1.0),
        (16, 2.0),
        (24, 30.0),
        (32, 40.0),
    ]


class StandIn(types.ModuleType):
    """Records what a run sends to Weights & Biases."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(origin="here")
        self.begun, self.sent, self.ended, self.metrics = [], [], [], []
        self.Image = lambda picture: ("image", picture.size)

    def init(self, **settings):
        if settings["project"] == "closed":
            raise self.Error("api_key not configured\n(no-tty)")
        self.begun.append(settings)
        return types.SimpleNamespace(
            log=self.sent.append,
            finish=lambda exit_code: self.ended.append(exit_code),
            define_metric=lambda name, step_metric=None: self.metrics.append((name, step_metric)),
        )


@pytest.fixture
def wandb(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_goes_on_with_the_same_run(recipe, tmp_path, wandb):
    options = LogOptions(tensorboard=False, wandb="mine")
    check_wandb(options)
    run = tmp_path / "kl-f8"
    run.mkdir()
    with MetricsLog(run, 0, options, recipe) as log:
        log.write(1, 8, {"loss/total": 0.5})
        log.picture(8, Image.fromarray(np.zeros((4, 6, 3), np.uint8)))
    with pytest.raises(KeyboardInterrupt), MetricsLog(run, 1, options, recipe):
        raise KeyboardInterrupt
    first, second = wandb.begun
    assert first["id"] == second["id"] == (run / "wandb_id.txt").read_text().strip()
    assert (first["project"], first["name"], first["resume"]) == ("mine", "kl-f8", "allow")
    assert first["config"]["batch_size"] == recipe.batch_size
    assert wandb.sent == [
        {"images": 8, "loss/total": 0.5},
        {"images": 8, "validation/reconstructions": ("image", (6, 4))},
    ]
    assert wandb.ended == [0, 1]
    assert ("*", "images") in wandb.metrics


def test_weights_and_biases_that_does_not_start_is_one_line(recipe, tmp_path, wandb):
    with pytest.raises(
        OutputError, match=r"api_key not configured \(no-tty\)\); run `wandb login`, set WANDB_MODE=offline"
    ):
        MetricsLog(tmp_path, 0, LogOptions(tensorboard=False, wandb="closed"), recipe)


def test_a_missing_package_is_said_before_any_work(monkeypatch, tmp_path):
    check_wandb(PLAIN)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"log.wandb is 'mine'.*latentae\[wandb\]"):
        check_wandb(LogOptions(wandb="mine"))
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: types.SimpleNamespace(origin=None)
    )  # a folder of logs
    with pytest.raises(MissingDependencyError):
        check_wandb(LogOptions(wandb="mine"))


def test_the_real_package_works_offline(recipe, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {
        "MODE": "offline",
        "SILENT": "true",
        "CONFIG_DIR": tmp_path / "c",
        "CACHE_DIR": tmp_path / "d",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    options = LogOptions(tensorboard=False, wandb="mine")
    check_wandb(options)
    for step in (1, 2):
        with MetricsLog(tmp_path, step - 1, options, recipe) as log:
            log.write(step, 8 * step, {"loss/total": 0.5, "loss/kl": math.nan})
            log.picture(8 * step, Image.fromarray(np.zeros((4, 6, 3), np.uint8)))
    found = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(found) == 2
    assert {folder.name.rpartition("-")[2] for folder in found} == {
        (tmp_path / "wandb_id.txt").read_text().strip()
    }


def test_devices_in_words():
    accelerator = types.SimpleNamespace(device=torch.device("cpu"), num_processes=2, mixed_precision="no")
    assert devices(accelerator) == "2 processes, CPU, fp32"


def test_peak_memory_is_that_of_this_process():
    if sys.platform == "linux":
        before = peak_memory_gb(torch.device("cpu"))
        assert 0.05 < before < 64
        torch.ones(1000, 1000, 50)  # 0.2 GB
        assert peak_memory_gb(torch.device("cpu")) >= before

"""The Ray engine with one worker in this process and on a cluster of two."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from latentae import encode
from latentae.encoding.shard_encoder import ModelEncoder
from latentae.errors import LatentAEError, MissingDependencyError, ModelError, OutputError

DRIVER = Path(__file__).with_name("ray_worker.py")
OPTIONS = {"dtype": "fp32", "batch_size": 4, "device": "cpu", "engine": "ray"}


@pytest.fixture(scope="module")
def _ray():
    pytest.importorskip("ray")
    pytest.importorskip("pyarrow")


def driver(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(DRIVER.parent),
    }
    command = [sys.executable, str(DRIVER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_one_of_two_workers_is_killed_and_the_output_is_that_of_the_local_engine(
    encoded, model, photos, snapshot, tmp_path
):
    torch.set_num_threads(1)
    mark = tmp_path / "died"
    done = driver(model, photos, tmp_path / "out", "die", mark)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "True"
    assert "2 Ray workers, 4 shards" in done.stderr
    assert mark.exists()
    assert snapshot(tmp_path / "out") == snapshot(encoded)


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_an_error_of_a_worker_ends_the_run_and_the_next_one_goes_on(
    model, photos, encoded, snapshot, tmp_path
):
    """The first half by the local engine, then a worker with an error, then the rest."""
    out = tmp_path / "out"
    assert not encode(model, photos, out, **{**OPTIONS, "engine": "local"}, task_id=0, num_tasks=2)[
        "finished"
    ]
    failed = driver(model, photos, out, "raise", tmp_path / "raised")
    assert failed.returncode != 0
    assert failed.stderr.splitlines()[-1] == "latentae.errors.ModelError: the model broke"
    assert not (out / "statistics.json").exists()
    done = driver(model, photos, out, "live", tmp_path / "none")
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == snapshot(encoded)


class FakeRay(types.ModuleType):
    """The parts of Ray that the engine uses, with one worker here; `answer` changes its results."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.data = types.ModuleType("ray.data")
        self.data.from_items = lambda rows, **_: FakeRows(self, rows)
        self.data.DataContext = types.SimpleNamespace(get_current=types.SimpleNamespace)
        self.data.ActorPoolStrategy = types.SimpleNamespace
        self.exceptions = types.SimpleNamespace(RayError=type("RayError", (Exception,), {}))
        self.resources, self.answer = {"CPU": 64.0}, dict
        self.is_initialized = lambda: True
        self.cluster_resources = lambda: self.resources


class FakeRows:
    def __init__(self, ray: FakeRay, rows) -> None:
        self.ray, self.rows = ray, rows

    def map(self, worker, *, fn_constructor_args, **_):
        call = worker(*fn_constructor_args)
        return FakeRows(self.ray, (self.ray.answer(call(row)) for row in self.rows))

    def iter_rows(self):
        return iter(self.rows)


@pytest.fixture
def fake_ray(monkeypatch):
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.data", fake.data)
    return fake


@pytest.mark.usefixtures("fake_ray")
def test_a_worker_writes_what_the_local_engine_does(encoded, model, photos, snapshot, tmp_path):
    assert encode(model, photos, tmp_path / "out", **OPTIONS)["finished"]
    assert snapshot(tmp_path / "out") == snapshot(encoded)


def test_an_error_comes_back_as_the_class_it_was(fake_ray, model, photos, tmp_path, monkeypatch):
    def broken(self, images):
        raise ModelError("the model broke")

    monkeypatch.setattr(ModelEncoder, "__call__", broken)
    with pytest.raises(ModelError, match="the model broke"):
        encode(model, photos, tmp_path / "out", **OPTIONS)
    fake_ray.answer = lambda row: {**row, "kind": "Unheard", "error": "of"}
    with pytest.raises(LatentAEError, match="of") as caught:
        encode(model, photos, tmp_path / "out", **OPTIONS)
    assert type(caught.value) is LatentAEError

    def died(row):
        raise fake_ray.exceptions.RayError("a long story\n  the node died\n")

    fake_ray.answer = died
    with pytest.raises(OutputError, match=r"Ray workers failed \(the node died\)"):
        encode(model, photos, tmp_path / "out", **OPTIONS)


def test_without_ray_or_without_room_one_line_says_what_to_do(fake_ray, model, photos, tmp_path, monkeypatch):
    fake_ray.resources = {"CPU": 0.0}
    with pytest.raises(OutputError, match="too small for a worker, which takes num_cpus"):
        encode(model, photos, tmp_path / "out", **OPTIONS)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'latentae\[ray\]'"):
        encode(model, photos, tmp_path / "out", **OPTIONS)

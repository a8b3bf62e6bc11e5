"""The Ray engine on a local cluster of two workers. The driver runs in a process of its own: Ray changes the one it is in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentae import encode
from latentae.encoding import ray_engine
from latentae.errors import MissingDependencyError, OutputError, ShardError

DRIVER = Path(__file__).with_name("ray_worker.py")
OPTIONS = {"dtype": "fp32", "batch_size": 4, "device": "cpu", "engine": "ray"}


@pytest.fixture(scope="module")
def _ray():
    pytest.importorskip("ray")
    pytest.importorskip("pyarrow")


def driver(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(DRIVER.parent)}
    command = [sys.executable, str(DRIVER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_one_of_two_workers_is_killed_and_the_output_is_that_of_the_local_engine(encoded, model, photos, snapshot, tmp_path):
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
def test_an_error_of_a_worker_ends_the_run_and_the_next_one_goes_on(model, photos, encoded, snapshot, tmp_path):
    """The first half by the local engine, then a worker with an error, then the rest."""
    out = tmp_path / "out"
    assert not encode(model, photos, out, **{**OPTIONS, "engine": "local"}, task_id=0, num_tasks=2)["finished"]
    failed = driver(model, photos, out, "raise", tmp_path / "raised")
    assert failed.returncode != 0
    assert failed.stderr.splitlines()[-1] == "latentae.errors.ModelError: the model broke"
    assert not (out / "statistics.json").exists()
    done = driver(model, photos, out, "live", tmp_path / "none")
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == snapshot(encoded)


def test_without_ray_one_line_says_what_to_install(model, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'latentae\[ray\]'"):
        encode(model, photos, tmp_path / "out", **OPTIONS)


def test_an_error_comes_back_as_the_class_it_was():
    assert isinstance(ray_engine._rebuilt("ShardError", "damaged"), ShardError)
    assert type(ray_engine._rebuilt("Unheard", "of")).__name__ == "LatentAEError"


def test_a_cluster_without_room_is_refused(model, photos, tmp_path):
    class Small:
        @staticmethod
        def cluster_resources() -> dict[str, float]:
            return {"CPU": 0.0}

    from latentae.encoding.encode import prepare

    work = prepare(model, photos, tmp_path / "out", device="cpu")
    with pytest.raises(OutputError, match="no room for a worker"):
        ray_engine._workers(Small, work)

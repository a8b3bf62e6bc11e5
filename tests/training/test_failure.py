"""What a run survives: kills, signals, full disks, bad numbers, lost processes. The moments are chosen in failure_worker.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import latentae
from latentae.errors import TrainingError
from latentae.training import steps
from latentae.training.checkpoint import find_checkpoint, read_state
from latentae.training.recovery import roll_back

WORKER = Path(__file__).with_name("failure_worker.py")
KILLS = int(os.environ.get("LATENTAE_KILLS", "50"))
FAILING = {
    "images": 64,
    "data.validation": "auto",
    "data.validation_fraction": 0.2,
    "log.validation_every_images": 8,
    "log.metrics_every_images": 4,
    "loss.adversarial.weight": 0.3,
    "loss.adversarial.channels": 8,
    "loss.adversarial.layers": 2,
    "loss.adversarial.lecam": 0.1,
    "loss.learn_logvar": True,
}


def work(small, folder, *verbs):
    recipe = folder / "recipe.toml"
    recipe.write_text(small(**FAILING).toml())
    done = subprocess.run(
        [sys.executable, str(WORKER), str(recipe), str(folder), str(KILLS), *verbs],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_a_run_killed_at_random_moments_ends_bitwise_like_the_uninterrupted_one(small, tmp_path):
    found = work(small, tmp_path, "kill")["kill"]
    print(f"{KILLS} kills fell {found['fell']}, {found['finished_runs']} runs came to their end, {found['seconds']} s")
    assert sum(found["fell"].values()) >= KILLS
    for phase in ("step", "evaluation", "save"):
        assert found["fell"][phase] >= KILLS // 10, f"too few kills fell into {phase}: {found['fell']}"


_worked = {}


@pytest.fixture
def worked(small, tmp_path):
    """What happened to the runs that were stopped, filled up and left alone: once for all tests."""
    if not _worked:
        _worked.update(work(small, tmp_path, "stop", "fill", "lose"))
    return _worked


@pytest.mark.parametrize("phase", ["start", "step", "evaluation", "save"])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_is_answered_from_every_phase(phase, name, code, worked):
    (end,) = [end for end in worked["stop"]["ends"] if (end["phase"], end["signal"]) == (phase, name)]
    assert end["code"] == code, end
    assert end["took"] < 20
    if phase == "start":
        assert end["steps"] == 0
        assert end["last_line"] == f"latentae: error: stopped by {name} before the first step; the same command goes on"
    else:
        assert end["steps"] >= 1, "what was done is saved"
        assert "the same command goes on from there" in end["last_line"]


def test_a_run_stopped_by_signals_ends_bitwise_like_the_uninterrupted_one(worked):
    assert worked["stop"]["differences"] == []


def test_a_full_disk_leaves_the_previous_checkpoint_and_the_run_goes_on_after(worked):
    parts = set()
    for end in worked["fill"]["ends"]:
        assert end["code"] == 1
        *before, last = end["said"].splitlines()
        assert last.startswith("latentae: error: could not write "), end["said"]
        assert last.endswith(": File too large; free the space or choose another folder")
        assert not any("error" in line.lower() or "Traceback" in line for line in before)
        parts.add(last.split("could not write ")[1].split(":")[0].rpartition("/")[2])
        assert end["step"] == 4
        assert end["left"] == ["latest", "step-00000002", "step-00000004"], "nothing that looks like a checkpoint"
        assert end["differences"] == []
    assert {"autoencoder.safetensors", "step-00000006"} <= parts, "safetensors files and the optimizers' fill the disk in turn"


@pytest.mark.parametrize(("who", "other"), [(1, "latentae"), (0, "latentae (rank 1)")])
def test_a_process_that_dies_ends_the_other_with_one_line(who, other, worked):
    end = worked["lose"][f"SIGKILL {who}"]
    assert end["codes"] == ([1, -9] if who else [-9, 1])
    assert end["took"] < 60
    last = end["said"].splitlines()[-1]
    assert last.startswith(f"{other}: error: lost contact with another process (")
    assert "Traceback" not in end["said"]


def test_a_signal_to_one_process_stops_all_at_the_same_step(worked):
    end = worked["lose"]["SIGTERM 1"]
    assert end["codes"] == [75, 75]
    assert end["step"] >= 3
    assert worked["lose"]["differences"] == [], "and the run ends like the uninterrupted one of two processes"


def test_a_step_that_one_process_finds_bad_is_left_out_on_all(worked):
    assert worked["lose"]["bad_step"] == [0, 0]
    assert worked["lose"]["skipped"] == 1


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the images of some steps no numbers."""

    def poison(*bad):
        update, to_float, step = steps.Trainer.update, steps.to_float, [0]

        def counted(self, *arguments):
            step[0] = self.state.step
            return update(self, *arguments)

        monkeypatch.setattr(steps.Trainer, "update", counted)
        monkeypatch.setattr(steps, "to_float", lambda images: to_float(images) * (float("nan") if step[0] in bad else 1.0))

    return poison


def states(run):
    return {folder.name: read_state(folder) for folder in sorted((run / "checkpoints").glob("step-*"))}


def events(run, kind):
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_a_step_that_is_not_finite_is_left_out_and_counted(small, tmp_path, poisoned):
    poisoned(2)
    run = latentae.train(small(), tmp_path / "run")
    state = read_state(find_checkpoint(run))
    assert (state.step, state.images_seen, state.skipped, state.skipped_in_a_row, state.rollbacks) == (6, 24, 1, 0, 0)
    (event,) = events(run, "skipped")
    assert (event["step"], event["images"]) == (3, 12)
    assert "is not finite" in event["message"]


def test_too_many_in_a_row_return_to_the_last_checkpoint_without_its_data(small, tmp_path, poisoned, monkeypatch):
    kept = {}

    def spy(trainer, run):
        message = roll_back(trainer, run)
        kept.update({name: value.clone() for name, value in trainer.raw_autoencoder.state_dict().items()})
        return message

    monkeypatch.setattr("latentae.training.loop.roll_back", spy)
    poisoned(3, 4)
    recipe = small(images=32, keep_checkpoints=9, **{"failure.max_skipped_in_a_row": 2})
    run = latentae.train(recipe, tmp_path / "run")
    found = states(run)
    after = found["step-00000005"]
    assert (after.step, after.images_seen, after.skipped, after.skipped_in_a_row, after.rollbacks) == (5, 20, 2, 0, 1)
    assert found["step-00000008"].rollbacks == 1
    source = "step-00000004"  # step 3 was good, step 4 the first bad one: its checkpoint has the weights after step 3
    before = load_file(run / "checkpoints" / source / "autoencoder.safetensors")
    assert all(torch.equal(before[name], value) for name, value in kept.items())
    (event,) = events(run, "rollback")
    assert source in event["message"]


def test_too_many_returns_stop_the_run_with_the_reason_and_leave_it_resumable(small, tmp_path, poisoned):
    poisoned(*range(3, 100))
    limits = {"failure.max_skipped_in_a_row": 2, "failure.max_rollbacks": 2}
    with pytest.raises(
        TrainingError, match=r"2 steps in a row had a loss or gradient that is not finite .*after 2 returns"
    ) as caught:
        latentae.train(small(images=400, **limits), tmp_path / "run")
    assert "\n" not in str(caught.value)
    state = read_state(find_checkpoint(tmp_path / "run"))
    assert state.rollbacks == 2
    assert len(events(tmp_path / "run", "rollback")) == 2


def test_bad_numbers_before_the_first_checkpoint_stop_the_run_with_the_reason(small, tmp_path, poisoned):
    poisoned(0, 1)
    with pytest.raises(TrainingError, match="there is no checkpoint yet to return to"):
        latentae.train(small(checkpoint_every_images=100, **{"failure.max_skipped_in_a_row": 2}), tmp_path / "run")

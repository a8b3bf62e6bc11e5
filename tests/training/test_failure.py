"""Runs survive kills, signals, full disks, non-finite numbers and lost processes."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
from functools import partial
from itertools import count, cycle

import pytest
import torch
from forked import Processes
from safetensors.torch import load_file

import latentae
from latentae import cli
from latentae.errors import TrainingError
from latentae.files import read_json
from latentae.training import checkpoint, steps, train
from latentae.training.checkpoint import find_checkpoint, read_state, roll_back, verify
from latentae.training.loop import Validation
from latentae.training.mirror import Mirror

AGAIN = "run the same command again to resume"
KILLS = int(os.environ.get("LATENTAE_KILLS", "30"))
FAILING = {
    "images": 48,
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
MOMENTS = {
    "start": (train, "build_loader"),
    "step": (train.Trainer, "update"),
    "end of a step": (steps, "agree"),
    "evaluation": (Validation, "run"),
    "save": (train, "save_checkpoint"),
    "half of a save": (torch, "save"),
    "check of a save": (checkpoint, "verify"),
}


def training(harm, words):
    """A process that trains as the command line would, while something happens to it.

    Args:
        harm: (rank, moment, occurrence, what is called as a function begins).
        words: of the command line.
    """
    for rank, moment, occurrence, act in harm:
        if rank == int(os.environ.get("RANK", "0")):
            at(moment, occurrence, act)
    cli.main(["train", *words])


def at(moment, occurrence, act):
    owner, name = MOMENTS[moment]
    function, calls = getattr(owner, name), count(1)

    def run(*arguments, **options):
        if next(calls) == occurrence:
            act()
        return function(*arguments, **options)

    setattr(owner, name, run)


def send(name):
    return partial(signal.raise_signal, getattr(signal, name))


def fill(size):
    """No file may become larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def spoil():
    """The next images are no numbers."""
    clean = steps.to_float

    def once(images):
        steps.to_float = clean
        return clean(images) * float("nan")

    steps.to_float = once


def die_within(seconds):
    """Die without a word, as of SIGKILL, as nobody handles this signal."""
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))


@pytest.fixture(scope="module")
def start(small, tmp_path_factory):
    """Begin or resume a run in processes of their own."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    recipe.write_text(small(**FAILING).toml())

    def make(run, *options, harm=(), processes=1):
        run.parent.mkdir(exist_ok=True)
        words = [str(recipe), "--output", str(run), *options]
        return Processes(run.parent, training, harm, words, count=processes)

    return make


@pytest.fixture(scope="module")
def complete(start):
    """Train a run to its end."""

    def make(run, *options, processes=1, harm=()):
        begun = start(run, *options, processes=processes, harm=harm)
        assert begun.wait() == [0] * processes, begun.output() + begun.output(processes - 1)
        return run

    return make


@pytest.fixture(scope="module")
def whole(complete, tmp_path_factory):
    """A run that nothing happened to."""
    return complete(tmp_path_factory.mktemp("whole") / "run")


def seen(run):
    """Images of the last checkpoint, which is complete."""
    latest = find_checkpoint(run)
    if latest is None:
        return 0
    verify(latest)
    return read_state(latest).images_seen


def differences(run, other):
    """Files and tensors of two runs' last checkpoints, and logged steps, that differ."""
    a, b = find_checkpoint(run), find_checkpoint(other)
    names = sorted(
        {file.name for folder in (a, b) for file in folder.iterdir()}
        - {"meta.json", "optimizers.pt", "recipe.toml"}
    )
    found = [name for name in names if (a / name).read_bytes() != (b / name).read_bytes()]
    states = [torch.load(folder / "optimizers.pt", weights_only=True) for folder in (a, b)]
    for name in states[0]:
        for index, values in states[0][name]["state"].items():
            other_values = states[1][name]["state"][index]
            found += [
                f"{name} optimizer {index} {key}"
                for key, v in values.items()
                if not torch.equal(v, other_values[key])
            ]
    if logged(run) != logged(other):
        found.append(f"metrics.jsonl: steps {logged(run)} and {logged(other)}")
    return found


def logged(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss/total" in line]


def test_a_run_killed_in_every_phase_ends_bitwise_like_the_uninterrupted_one(
    start, complete, whole, tmp_path
):
    run = tmp_path / "run"
    for moment, occurrence, images in (
        ("start", 1, 0),
        ("end of a step", 3, 8),
        ("evaluation", 1, 16),
        ("half of a save", 1, 16),
        ("check of a save", 2, 16),  # the first one is of the checkpoint that it resumes
    ):
        killed = start(run, harm=[(0, moment, occurrence, send("SIGKILL"))])
        assert killed.wait() == [-signal.SIGKILL], killed.output()
        assert seen(run) == images, moment
    assert differences(complete(run), whole) == []


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bitwise_like_the_uninterrupted_one(
    start, complete, whole, tmp_path
):
    """Again and again.

    Each run that gets to its end equals the uninterrupted one, and so does its copy.
    """
    rng, kills, runs = random.Random(0), 0, 0
    moments = cycle(
        ["save", "step", "evaluation", "half of a save", "end of a step", "check of a save", "start"]
    )
    while kills < KILLS or not runs:
        run, store = tmp_path / str(runs) / "run", tmp_path / str(runs) / "store"
        harm = (0, next(moments), rng.randint(1, 3), partial(die_within, 0.05 * rng.random()))
        begun = start(run, "--checkpoint-url", f"file://{store}", harm=[harm])
        (code,) = begun.wait()
        seen(run)
        for meta in store.glob("step-*/meta.json"):
            verify(meta.parent)  # a copy with its meta.json is complete
        if code == -signal.SIGALRM:
            kills += 1
            continue
        assert code == 0, begun.output()
        runs += 1
        assert differences(run, whole) == [], begun.output()
        copy = Mirror(f"file://{store}", read_json(run / "latentae.json")["inputs"], 1).newest(
            run.with_name("copy")
        )
        assert all(
            (copy / file.name).read_bytes() == file.read_bytes() for file in find_checkpoint(run).iterdir()
        )


def test_a_signal_is_answered_from_every_phase_and_the_run_ends_bitwise_like_the_uninterrupted_one(
    start, complete, whole, tmp_path
):
    run = tmp_path / "run"
    for phase, name, code, images in (
        ("start", "SIGTERM", 75, 0),
        ("start", "SIGINT", 130, 0),
        ("step", "SIGINT", 130, 4),
        ("step", "SIGUSR1", 75, 8),
        ("evaluation", "SIGTERM", 75, 16),
        ("evaluation", "SIGINT", 130, 24),
        ("save", "SIGUSR1", 75, 32),
    ):
        stopped = start(run, harm=[(0, phase, 1, send(name))])
        assert stopped.wait() == [code], stopped.output()
        last = stopped.output().splitlines()[-1]
        if phase == "start":
            assert last == f"latentae: error: stopped by {name} before the first step; {AGAIN}"
        else:
            assert (
                last
                == f"latentae: error: stopped after {images} images; run the same command again to resume"
            )
        assert seen(run) == images, "what was done is saved, and no more is done"
    assert differences(complete(run), whole) == []


@pytest.mark.parametrize("full", ["autoencoder.safetensors", "optimizers.pt"])
def test_a_full_disk_leaves_the_previous_checkpoint_and_the_run_goes_on_after(
    full, start, complete, whole, tmp_path
):
    run, size = tmp_path / "run", (find_checkpoint(whole) / full).stat().st_size
    stopped = start(run, harm=[(0, "save", 3, partial(fill, size - 1))])
    assert stopped.wait() == [1]
    *before, last = stopped.output().splitlines()
    assert last.startswith("latentae: error: could not write "), stopped.output()
    assert last.endswith(": File too large; free the space or choose another folder")
    assert not any("error" in line.lower() or "Traceback" in line for line in before)
    assert seen(run) == 16
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["latest", "step-00000002", "step-00000004"], "nothing that looks like a checkpoint"
    assert differences(complete(run), whole) == []


def test_what_happens_to_one_of_two_processes_happens_to_both(start, complete, tmp_path):
    whole = complete(tmp_path / "whole" / "run", processes=2)
    run = tmp_path / "two" / "run"
    for victim, name, codes in ((1, "SIGKILL", [1, -9]), (0, "SIGKILL", [-9, 1]), (1, "SIGTERM", [75, 75])):
        pair = start(run, processes=2, harm=[(victim, "step", 3, send(name))])
        assert pair.wait() == codes, pair.output() + pair.output(1)
        said = pair.output(1 - victim)
        if name == "SIGKILL":
            who = "latentae" if victim else "latentae (rank 1)"
            assert said.splitlines()[-1].startswith(f"{who}: error: lost contact with another process (")
            assert "Traceback" not in said
    assert seen(run) == 8 + 8 + 12, "a signal to one stops both at the same step"
    assert differences(complete(run, processes=2), whole) == []


def test_a_step_that_one_process_finds_bad_is_left_out_on_all(complete, tmp_path):
    run = complete(tmp_path / "run", processes=2, harm=[(1, "step", 3, spoil)])
    assert read_state(find_checkpoint(run)).skipped == 1


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the images of some steps no numbers."""

    def poison(*bad):
        update = steps.Trainer.update

        def poisoned_update(self, *arguments):
            if self.state.step in bad:
                spoil()
            return update(self, *arguments)

        monkeypatch.setattr(steps.Trainer, "update", poisoned_update)

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
    assert (state.step, state.images_seen, state.skipped, state.skipped_in_a_row, state.rollbacks) == (
        6,
        24,
        1,
        0,
        0,
    )
    (event,) = events(run, "skipped")
    assert (event["step"], event["images"]) == (3, 12)
    assert "is not finite" in event["message"]


def test_too_many_in_a_row_return_to_the_last_checkpoint_without_its_data(
    small, tmp_path, poisoned, monkeypatch
):
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
    assert (after.step, after.images_seen, after.skipped, after.skipped_in_a_row, after.rollbacks) == (
        5,
        20,
        2,
        0,
        1,
    )
    assert found["step-00000008"].rollbacks == 1
    source = "step-00000004"  # of step 4, the first bad one, with the weights after step 3
    before = load_file(run / "checkpoints" / source / "autoencoder.safetensors")
    assert all(torch.equal(before[name], value) for name, value in kept.items())
    (event,) = events(run, "rollback")
    assert source in event["message"]


@pytest.mark.parametrize(
    ("bad", "options", "reason", "returns"),
    [
        (range(3, 100), {}, "after 2 rollbacks", 2),
        (range(2), {"checkpoint_every_images": 100}, "there is no checkpoint yet to roll back to", 0),
    ],
)
def test_too_many_bad_steps_stop_the_run_with_the_reason(
    bad, options, reason, returns, small, tmp_path, poisoned
):
    poisoned(*bad)
    limits = {"failure.max_skipped_in_a_row": 2, "failure.max_rollbacks": 2}
    message = f"2 steps in a row had a non-finite loss or gradient .*{reason}"
    with pytest.raises(TrainingError, match=message) as caught:
        latentae.train(small(images=400, **options, **limits), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert len(events(tmp_path / "run", "rollback")) == returns
    if returns:
        assert read_state(find_checkpoint(tmp_path / "run")).rollbacks == returns, "it can be resumed"

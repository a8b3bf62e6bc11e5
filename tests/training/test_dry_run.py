"""The dry run takes real steps, prints plausible numbers and leaves no files."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import types
from functools import partial
from multiprocessing import util

import pytest
import torch
from forked import Processes
from PIL import Image

from latentae import cli
from latentae.errors import DataError, Interrupted, MissingDependencyError, RecipeError, TrainingError
from latentae.training import dry_run as module
from latentae.training import train
from latentae.training.checkpoint import find_checkpoint
from latentae.training.dry_run import dry_run, measure_speed
from latentae.training.recipe import Recipe


@pytest.fixture(autouse=True)
def _temporary(tmp_path_factory, monkeypatch):
    """A folder for temporary files; each test leaves it empty."""
    util.get_temp_dir()  # the fork server creates its own, outside the watched folder
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


@pytest.fixture
def phased(small):
    """Two phases: the discriminator starts in the middle of the first."""

    def make(**overrides):
        values = small(
            **{"data.validation": "auto", "data.validation_fraction": 0.3, **overrides}
        ).model_dump(mode="json")
        del values["images"]
        values["loss"]["adversarial"] |= {"weight": 0.5, "adaptive": True, "channels": 4, "layers": 1}
        phases = [
            {"name": "whole", "images": 100_000, "loss": {"adversarial": {"start_images": 60_000}}},
            {
                "name": "head",
                "images": 50_000,
                "model": {"train": "decoder-head"},
                "data": {"resolution": 40},
            },
        ]
        return Recipe(**{**values, "phases": phases})

    return make


def listing(folder):
    """Every entry of a folder with what a write would change."""
    stats = {path: path.lstat() for path in [folder, *folder.rglob("*")]}
    return {
        path: (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino) for path, stat in stats.items()
    }


@pytest.fixture
def own(shards, tmp_path):
    """Shards of two folders with the same names, the indexes of the first one lost."""
    for name in ("first", "second"):
        shutil.copytree(shards, tmp_path / "data" / name)
    for file in (tmp_path / "data" / "first").glob("*.index"):
        file.unlink()
    return tmp_path / "data"


def test_a_dry_run_measures_every_part_and_writes_nothing(phased, own, tmp_path, monkeypatch, capsys):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("COLUMNS", "200")  # on a slow machine times are long, and names would be wrapped
    before = listing(tmp_path)
    result = dry_run(phased(**{"data.shards": f"{own / 'first'}::{own / 'second'}"}), seconds=0.05)
    assert listing(tmp_path) == before
    assert [(part.phase, part.adversarial, part.images) for part in result.parts] == [
        (0, False, 60_000), (0, True, 40_000), (1, True, 50_000),
    ]  # fmt: skip
    for part in result.parts:
        assert part.images_per_second * part.seconds_a_step == pytest.approx(4)
        assert 1 < part.images_per_second < 10_000
        assert 0 <= part.data_wait < 1
        assert 0.1 < part.memory_gb < 32
        assert part.skipped == 0
    assert result.validation_seconds > 0
    assert result.seconds == pytest.approx(
        sum(part.seconds for part in result.parts) + result.validation_seconds
    )
    assert 100_000 < result.checkpoint_bytes < 10_000_000
    printed = capsys.readouterr()
    for wanted in (
        "0 whole",
        "0 whole + GAN",
        "1 head + GAN",
        "60,000",
        "complete recipe:",
        "one checkpoint:",
        "1 process, CPU",
    ):
        assert wanted in printed.out
    assert "dry run: 0 whole, 60,000 images" in printed.err


def test_the_checkpoint_is_as_large_as_foretold(small, whole_run):
    found = sum(file.stat().st_size for file in find_checkpoint(whole_run).iterdir())
    foretold = dry_run(small(), seconds=0).checkpoint_bytes
    assert foretold < found < foretold + 150_000, "names and small files come on top of the numbers"


@pytest.mark.parametrize("data", ["indexes of their own", "images"])
def test_neither_a_folder_of_indexes_nor_one_of_images_gets_new_files(data, small, own, tmp_path):
    if data == "images":
        for number in range(20):
            (tmp_path / "photos" / f"album {number % 3}").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (number, 0, 0)).save(
                tmp_path / "photos" / f"album {number % 3}" / f"{number}.png"
            )
        recipe = small(**{"data.shards": str(tmp_path / "photos")})
    else:
        (tmp_path / "indexes").mkdir()
        shutil.move(next((own / "second").glob("*.index")), tmp_path / "indexes")
        recipe = small(**{"data.shards": str(own / "second"), "data.index": str(tmp_path / "indexes")})
    before = listing(tmp_path)
    assert dry_run(recipe, seconds=0).parts[0].name == "all"
    assert listing(tmp_path) == before


@pytest.fixture
def staged(monkeypatch):
    """Steps of 1 s, or 3 s with the discriminator, of which 0.25 s wait for data."""
    clock = types.SimpleNamespace(now=100.0)  # only the stand-ins advance it
    clock.monotonic = lambda: clock.now

    class StandIn:
        def __init__(self, recipe, accelerator):
            self.recipe, self.accelerator = recipe, accelerator
            self.state = types.SimpleNamespace(skipped=0, step=0)
            self.adversarial = (
                recipe.loss.adversarial.weight > 0 and recipe.loss.adversarial.start_images == 0
            )
            self.saved = {name: torch.nn.Linear(recipe.data.resolution, 2) for name in ("autoencoder", "ema")}
            self.optimizers = {}

        def check_resolution(self):
            pass

        def update(self, parts):
            clock.now += (2.75 if self.adversarial else 0.75) + (50 if self.state.step < 2 else 0)
            if self.recipe.loss.adversarial.r1 and self.adversarial and self.state.step % 16 == 0:
                clock.now += 16
            self.state.step += 1

    def loader(recipe, accelerator):
        while True:
            clock.now += 0.25
            yield types.SimpleNamespace(images=torch.zeros(recipe.batch_size, 3, 4, 4))

    class Measured:
        def __init__(self, batches):
            pass

        def run(self, trainer):
            clock.now += 3

    def held_out(data, batch_size, limit):
        return [types.SimpleNamespace(keys=("a", "b"))] if data.validation == "auto" else []

    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "Trainer", StandIn)
    monkeypatch.setattr(module, "build_loader", loader)
    monkeypatch.setattr(module, "held_out_batches", held_out)
    monkeypatch.setattr(module, "Validation", Measured)


def test_phases_are_summed_with_their_shares(staged, phased):
    result = dry_run(
        phased(**{"log.validation_images": 10, "log.validation_every_images": 30_000}), seconds=5
    )
    assert [part.seconds_a_step for part in result.parts] == [1.0, 3.0, 3.0]
    assert [part.images_per_second for part in result.parts] == pytest.approx([4, 4 / 3, 4 / 3])
    assert [part.data_wait for part in result.parts] == pytest.approx([0.25, 0.25 / 3, 0.25 / 3])
    assert result.validation_seconds == pytest.approx(
        (4 + 2) * 10 * 3 / 2
    )  # begun ones count; two images take 3 s
    assert result.seconds == pytest.approx(
        60_000 / 4 + 40_000 / 4 * 3 + 50_000 / 4 * 3 + result.validation_seconds
    )
    assert result.checkpoint_bytes == 2 * (40 * 2 + 2) * 4, "of the phase that has the largest"


@pytest.mark.parametrize(
    ("weight", "start", "expected"),
    [
        (0.0, 0, [(False, 24)]),
        (1.0, 0, [(True, 24)]),
        (1.0, 20, [(False, 20), (True, 4)]),
        (1.0, 24, [(False, 24)]),
    ],
)
def test_a_phase_is_parted_where_the_discriminator_begins(staged, small, weight, start, expected):
    recipe = small(**{"loss.adversarial.weight": weight, "loss.adversarial.start_images": start})
    assert [(part.adversarial, part.images) for part in dry_run(recipe, seconds=0).parts] == expected


def test_whole_rounds_of_lazy_penalties_are_measured(staged, small):
    recipe = small(**{"loss.adversarial.weight": 1.0, "loss.adversarial.r1": 1.0})
    (part,) = dry_run(recipe, seconds=5).parts
    assert part.seconds_a_step == pytest.approx(4.0)  # 3 s, and 16 s every 16 steps


def test_the_speed_alone_counts_the_discriminator_from_the_start(staged, small):
    assert measure_speed(small(), seconds=5) == pytest.approx(4)
    late = {"loss.adversarial.weight": 1.0, "loss.adversarial.start_images": 20}
    assert measure_speed(small(**late), seconds=5) == pytest.approx(4 / 3)


def test_the_speed_alone_is_that_of_real_steps(small):
    assert 0 < measure_speed(small(), seconds=0) < 100_000


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"data.resolution": 30}, RecipeError, "use 28"),
        ({"batch_size": 100}, DataError, "one batch over all ranks takes 100"),
        ({"log.wandb": "mine"}, MissingDependencyError, "wandb"),
    ],
)
def test_what_training_would_refuse_is_refused(small, monkeypatch, overrides, error, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(error, match=message):
        dry_run(small(**overrides), seconds=0)


def test_no_data_and_unknown_recipes_are_refused():
    with pytest.raises(RecipeError, match="no training data"):
        dry_run("tiny-cpu")
    with pytest.raises(RecipeError, match="did you mean"):
        dry_run("tiny-cpi")


def test_too_little_memory_names_the_phase(phased, monkeypatch):
    def full(trainer, parts):
        if trainer.adversarial:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr(module.Trainer, "update", full)
    with pytest.raises(
        TrainingError, match=r"^phase 0 whole does not fit the GPU's memory; raise gradient_accumulation.*$"
    ):
        dry_run(phased(), seconds=0)


def test_a_signal_ends_it_and_leaves_nothing(small, monkeypatch):
    monkeypatch.setattr(module.Trainer, "update", lambda trainer, parts: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="SIGTERM in the dry run"):
        dry_run(small(), seconds=60)


def on_the_command_line(recipe, folder, temporary):
    os.chdir(folder)
    tempfile.tempdir = str(temporary)
    train.dry_run = partial(dry_run, seconds=0.1)
    cli.main(["train", str(recipe), "--dry-run"])


def test_two_processes_measure_together_and_print_once(small, own, tmp_path, tmp_path_factory):
    (tmp_path / "work").mkdir()
    recipe = small(
        **{"data.shards": str(own / "first"), "loss.adversarial.weight": 1.0, "loss.adversarial.channels": 4}
    )
    (tmp_path / "recipe.toml").write_text(recipe.toml())
    before, other = listing(tmp_path), tmp_path_factory.mktemp("other")
    arguments = tmp_path / "recipe.toml", tmp_path / "work", other
    processes = Processes(tmp_path_factory.mktemp("log"), on_the_command_line, *arguments, count=2)
    assert processes.wait() == [0, 0], processes.output() + processes.output(1)
    assert "2 processes, CPU" in processes.output()
    assert [processes.output(rank).count("complete recipe:") for rank in range(2)] == [1, 0]
    assert listing(tmp_path) == before
    assert not list(other.iterdir())

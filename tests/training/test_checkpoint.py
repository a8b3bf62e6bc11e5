from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch

from latentae.errors import ModelError, TrainingError
from latentae.files import sha256
from latentae.models.autoencoder import AutoencoderKL
from latentae.training import checkpoint
from latentae.training.checkpoint import find_checkpoint, load_checkpoint, read_state, save_checkpoint, verify
from latentae.training.launch import build_accelerator, close_accelerator
from latentae.training.steps import Trainer, TrainState

GAN = {"loss.adversarial.weight": 0.3, "loss.adversarial.channels": 8, "loss.adversarial.layers": 2}
FULL = {**GAN, "loss.adversarial.lecam": 0.1, "loss.learn_logvar": True}
DATA = {"format_version": 1, "batches": 3}
PARTS = ["autoencoder", "ema", "objective", "discriminator", "lecam"]


@pytest.fixture
def trained(small, accelerator):
    trainer = Trainer(small(**FULL), accelerator)
    step(trainer)
    return trainer


@pytest.fixture(scope="module")
def stored(small, tmp_path_factory):
    """A run with the checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("stored") / "run"
    accelerator = build_accelerator("fp32")
    trainer = Trainer(small(**FULL), accelerator)
    for _ in range(2):
        step(trainer)
        save_checkpoint(trainer, folder, DATA)
    close_accelerator(accelerator)
    return folder


@pytest.fixture
def pair(stored, tmp_path):
    """Copies of the two checkpoints, the older one first."""
    shutil.copytree(stored, tmp_path / "copy")
    return sorted((tmp_path / "copy" / "checkpoints").glob("step-*"))


def step(trainer):
    generator = torch.Generator().manual_seed(trainer.state.step)
    trainer.update([torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)])


def everything(trainer):
    tensors = {
        f"{name}.{key}": value
        for name, part in trainer.saved.items()
        for key, value in part.state_dict().items()
    }
    for name, optimizer in trainer.optimizers.items():
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer of {name}.{index}.{k}": torch.as_tensor(v) for k, v in values.items()}
    return {name: value.clone() for name, value in tensors.items()}


def rewrite(folder, **changes):
    """Change meta.json, and let it list what is there."""
    meta = json.loads((folder / "meta.json").read_text())
    meta["sha256"] = {
        file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name != "meta.json"
    }
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


def test_a_restored_trainer_goes_on_bitwise_like_the_uninterrupted_one(trained, small, accelerator, tmp_path):
    trained.state.skipped, trained.state.rollbacks = 3, 1
    folder = save_checkpoint(trained, tmp_path, DATA)
    assert sorted(p.stem for p in folder.glob("*.safetensors")) == sorted(PARTS)
    other = Trainer(small(**FULL), accelerator)
    assert load_checkpoint(other, folder) == DATA
    for trainer in (trained, other):
        step(trainer)
        step(trainer)
    assert (
        other.state
        == trained.state
        == TrainState(step=3, images_seen=12, phase_images=12, skipped=3, rollbacks=1)
    )
    a, b = everything(trained), everything(other)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_what_killed_runs_have_left_goes_and_the_latest_never_does(keep, trained, tmp_path):
    trained.recipe = trained.recipe.model_copy(update={"keep_checkpoints": keep})
    first = save_checkpoint(trained, tmp_path, DATA)
    step(trained)
    for name in (
        "step-00000002",
        "step-00000009",
        ".step-00000005.host.1.incomplete",
        ".step-00000001.incomplete",
    ):
        (first.parent / name).mkdir()  # renamed, but not yet the latest: written again
        (first.parent / name / "meta.json").write_text("{}")
    second = save_checkpoint(trained, tmp_path, DATA)
    assert second.name == "step-00000002"
    verify(second)
    assert sorted(p.name for p in first.parent.iterdir()) == ["latest", *[first.name, second.name][-keep:]]
    assert find_checkpoint(tmp_path) == find_checkpoint(second) == second
    assert find_checkpoint(tmp_path / "checkpoints") is None
    before = (second / "meta.json").stat().st_mtime_ns
    assert save_checkpoint(trained, tmp_path, DATA) == second
    assert (second / "meta.json").stat().st_mtime_ns == before, "a step is saved once"
    step(trained)
    third = save_checkpoint(trained, tmp_path, DATA)
    assert sorted(p.name for p in first.parent.iterdir()) == [
        "latest",
        *[first.name, second.name, third.name][-keep:],
    ]


def test_a_checkpoint_is_verified_before_it_is_the_latest_and_before_older_ones_go(
    trained, tmp_path, monkeypatch
):
    first = save_checkpoint(trained, tmp_path, DATA)
    step(trained)
    second = save_checkpoint(trained, tmp_path, DATA)
    step(trained)
    rename = type(first).replace

    def lying_disk(self, target):
        if self.is_dir():
            file = self / "ema.safetensors"
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        return rename(self, target)

    monkeypatch.setattr(type(first), "replace", lying_disk)
    with pytest.raises(
        TrainingError, match=rf"ema.safetensors is missing or damaged; continue from --resume .*{second.name}"
    ):
        save_checkpoint(trained, tmp_path, DATA)
    assert find_checkpoint(tmp_path) == second
    assert first.is_dir()


def test_a_checkpoint_says_its_job_format_and_versions_and_loads_as_a_model(trained, tmp_path):
    folder = save_checkpoint(trained, tmp_path, DATA, {"recipe": {"seed": 0}, "data_digest": "abc"})
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["format_version"] == checkpoint.FORMAT_VERSION == 2
    assert meta["torch"] == torch.__version__
    assert meta["inputs"] == {"recipe": {"seed": 0}, "data_digest": "abc"}
    assert (meta["step"], meta["phase"], meta["phase_images"]) == (1, 0, 4)
    ema, raw = (AutoencoderKL.from_pretrained(folder, weights) for weights in ("ema", "raw"))
    name = "decoder.conv_out.weight"
    assert torch.equal(raw.state_dict()[name], trained.raw_autoencoder.state_dict()[name])
    assert torch.equal(ema.state_dict()[name], trained.ema.weights[name])
    assert torch.equal(AutoencoderKL.from_pretrained(tmp_path).state_dict()[name], ema.state_dict()[name])


@pytest.mark.parametrize(
    "part", [*(f"{name}.safetensors" for name in PARTS), "optimizers.pt", "state.json", "config.json"]
)
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_part_is_fatal_and_the_older_checkpoint_is_named(part, damage, pair):
    older, folder = pair
    data = bytearray((folder / part).read_bytes())
    if damage == "gone":
        (folder / part).unlink()
    else:
        data[len(data) // 2] ^= 1
        (folder / part).write_bytes(data if damage == "flipped" else data[:-1])
    with pytest.raises(
        TrainingError,
        match=rf"{part} is missing or damaged; continue from --resume .*{older.name} with another --output",
    ):
        verify(folder)


@pytest.mark.parametrize("meta", [None, "", "[]", "{}", '{"sha256": {"../state.json": "0"}}'])
def test_a_folder_without_its_list_is_no_checkpoint(meta, pair):
    older, folder = pair
    shutil.rmtree(older)
    if meta is None:
        (folder / "meta.json").unlink()
    else:
        (folder / "meta.json").write_text(meta)
    with pytest.raises(
        TrainingError, match=r"meta\.json is missing or damaged; there is no older one|is incomplete"
    ):
        verify(folder)


def test_only_a_whole_older_checkpoint_is_named_and_nothing_is_loaded(trained, pair):
    before = everything(trained)
    for damaged in pair:
        (damaged / "ema.safetensors").unlink()
    with pytest.raises(
        TrainingError,
        match=r"step-00000002/ema\.safetensors is missing or damaged; there is no older one",
    ):
        load_checkpoint(trained, pair[1])
    after = everything(trained)
    assert [k for k in before if not torch.equal(before[k], after[k])] == []


def test_a_part_that_the_recipe_has_and_the_checkpoint_has_not_is_fatal(trained, stored, tmp_path):
    for part in (*PARTS, "optimizers"):
        folder = tmp_path / part
        shutil.copytree(find_checkpoint(stored), folder)
        if part == "optimizers":
            optimizers = torch.load(folder / "optimizers.pt", weights_only=True)
            del optimizers["discriminator"]
            torch.save(optimizers, folder / "optimizers.pt")
            found = r"no optimizer of the discriminator in optimizers\.pt"
        else:
            (folder / f"{part}.safetensors").unlink()
            found = rf"no {part}\.safetensors"
        rewrite(folder)
        advice = rf"has {found}, but this recipe has one; .*--model\.init-from {re.escape(str(folder))}"
        with pytest.raises(TrainingError, match=advice):
            load_checkpoint(trained, folder)


@pytest.mark.parametrize(
    ("part", "value"), [*zip(PARTS, [math.nan, math.inf, -math.inf, math.nan, math.inf], strict=True)]
)
def test_weights_that_are_not_finite_are_never_saved(part, value, trained, tmp_path):
    with pytest.raises(TrainingError, match="there is no earlier checkpoint"):
        damage(trained, part, value)
        save_checkpoint(trained, tmp_path, DATA)
    damage(trained, part, 0.5)
    save_checkpoint(trained, tmp_path, DATA)
    before = find_checkpoint(tmp_path)
    damage(trained, part, value)
    trained.state.step += 1
    with pytest.raises(
        TrainingError, match=f"{part}: .* is not finite at step 2; the last good checkpoint is step-00000001"
    ):
        save_checkpoint(trained, tmp_path, DATA)
    assert find_checkpoint(tmp_path) == before
    assert sorted(p.name for p in before.parent.iterdir()) == ["latest", before.name]


def damage(trainer, part, value):
    last = [v for v in trainer.saved[part].state_dict().values() if v.is_floating_point()][-1]
    last.data.view(-1)[-1] = value


def test_another_shape_is_one_clear_line(trained, small, accelerator, tmp_path):
    folder = save_checkpoint(trained, tmp_path, DATA)
    with pytest.raises(ModelError, match="latent_channels = 4"):
        load_checkpoint(Trainer(small(**FULL, **{"model.latent_channels": 4}), accelerator), folder)
    with pytest.raises(
        ModelError, match=r"does not fit this recipe \(.*shape.*\); resume with the recipe\.toml inside it"
    ) as caught:
        load_checkpoint(Trainer(small(**{**FULL, "loss.adversarial.channels": 16}), accelerator), folder)
    assert "\n" not in str(caught.value)


def test_a_newer_format_is_refused(pair):
    rewrite(pair[1], format_version=99)
    with pytest.raises(TrainingError, match="reads formats up to 2"):
        verify(pair[1])


def test_a_checkpoint_of_format_1_is_read(small, accelerator, tmp_path):
    trainer = Trainer(small(**GAN), accelerator)
    step(trainer)
    folder = save_checkpoint(trainer, tmp_path, DATA)
    parts = sorted(p.stem for p in folder.glob("*.safetensors"))
    assert parts == ["autoencoder", "discriminator", "ema"], "a part without a state has no file"
    (folder / "state.json").write_text(json.dumps({"step": 1, "images_seen": 4, "data": DATA}))
    rewrite(folder, format_version=1)
    other = Trainer(small(**GAN), accelerator)
    assert load_checkpoint(other, folder) == DATA
    assert read_state(folder) == other.state == TrainState(step=1, images_seen=4, phase_images=4), (
        "it knew one phase"
    )
    step(trainer)
    step(other)
    a, b = everything(trainer), everything(other)
    assert [k for k in a if not torch.equal(a[k], b[k])] == []

from __future__ import annotations

import json

import pytest
import torch

from latentae.errors import ModelError, OutputError, TrainingError
from latentae.models.autoencoder import AutoencoderKL
from latentae.training import checkpoint
from latentae.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from latentae.training.launch import build_accelerator, close_accelerator
from latentae.training.steps import Trainer

ADVERSARIAL = {"loss.adversarial.weight": 0.3, "loss.adversarial.channels": 8, "loss.adversarial.layers": 2}
DATA = {"format_version": 1, "batches": 3}


@pytest.fixture
def accelerator():
    accelerator = build_accelerator("fp32")
    yield accelerator
    close_accelerator(accelerator)


@pytest.fixture
def trained(small, accelerator):
    trainer = Trainer(small(**ADVERSARIAL), accelerator)
    step(trainer)
    return trainer


def step(trainer):
    generator = torch.Generator().manual_seed(trainer.state.step)
    trainer.update([torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)])


def everything(trainer):
    tensors = {**trainer.raw_autoencoder.state_dict(), **{f"ema.{k}": v for k, v in trainer.ema.weights.items()}}
    tensors |= {f"d.{k}": v for k, v in trainer.raw_discriminator.state_dict().items()}
    for name, optimizer in (("g", trainer.optimizer), ("d", trainer.discriminator_optimizer)):
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{index}.{k}": torch.as_tensor(v) for k, v in values.items()}
    return tensors


def test_a_restored_trainer_goes_on_bitwise_like_the_uninterrupted_one(trained, small, accelerator, tmp_path):
    folder = save_checkpoint(trained, tmp_path, DATA)
    other = Trainer(small(**ADVERSARIAL), accelerator)
    assert load_checkpoint(other, folder) == DATA
    for trainer in (trained, other):
        step(trainer)
        step(trainer)
    assert other.state == trained.state
    a, b = everything(trained), everything(other)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_latest_points_to_the_newest_and_old_ones_are_pruned(trained, tmp_path):
    for _ in range(4):
        step(trained)
        newest = save_checkpoint(trained, tmp_path, DATA)
    assert find_checkpoint(tmp_path) == newest
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == trained.recipe.keep_checkpoints
    assert find_checkpoint(newest) == newest
    assert find_checkpoint(tmp_path / "checkpoints") is None


def test_a_checkpoint_says_its_format_and_versions_and_loads_as_a_model(trained, tmp_path):
    folder = save_checkpoint(trained, tmp_path, DATA)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["format_version"] == 1
    assert meta["torch"] == torch.__version__
    ema, raw = (AutoencoderKL.from_pretrained(folder, weights) for weights in ("ema", "raw"))
    name = "decoder.conv_out.weight"
    assert torch.equal(raw.state_dict()[name], trained.raw_autoencoder.state_dict()[name])
    assert torch.equal(ema.state_dict()[name], trained.ema.weights[name])
    assert torch.equal(AutoencoderKL.from_pretrained(tmp_path).state_dict()[name], ema.state_dict()[name])


@pytest.mark.parametrize(
    "part", ["autoencoder.safetensors", "ema.safetensors", "discriminator.safetensors", "optimizers.pt", "state.json"]
)
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_part_is_fatal_and_the_older_checkpoint_is_named(part, damage, trained, tmp_path):
    older = save_checkpoint(trained, tmp_path, DATA)
    step(trained)
    folder = save_checkpoint(trained, tmp_path, DATA)
    data = bytearray((folder / part).read_bytes())
    if damage == "gone":
        (folder / part).unlink()
    else:
        data[len(data) // 2] ^= 1
        (folder / part).write_bytes(data if damage == "flipped" else data[:-1])
    with pytest.raises(TrainingError, match=rf"{part} is missing or damaged; give --resume .*{older.name}"):
        load_checkpoint(trained, folder)


def test_weights_that_are_not_finite_are_never_saved(trained, tmp_path):
    save_checkpoint(trained, tmp_path, DATA)
    before = find_checkpoint(tmp_path)
    next(iter(trained.raw_autoencoder.parameters())).data[0] = float("nan")
    trained.state.step += 1
    with pytest.raises(TrainingError, match="not finite at step 2; the last good checkpoint is step-00000001"):
        save_checkpoint(trained, tmp_path, DATA)
    assert find_checkpoint(tmp_path) == before


def test_a_full_disk_leaves_nothing_that_looks_complete(trained, tmp_path, monkeypatch):
    save_checkpoint(trained, tmp_path, DATA)
    before = find_checkpoint(tmp_path)
    step(trained)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OutputError, match="No space left on device"):
        save_checkpoint(trained, tmp_path, DATA)
    assert find_checkpoint(tmp_path) == before
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", before.name]


def test_another_shape_or_a_missing_discriminator_is_one_clear_line(trained, small, accelerator, tmp_path):
    folder = save_checkpoint(trained, tmp_path, DATA)
    with pytest.raises(ModelError, match="latent_channels = 4"):
        load_checkpoint(Trainer(small(**{"model.latent_channels": 4}), accelerator), folder)
    plain = Trainer(small(), accelerator)
    step(plain)
    plain.state.step = 7
    without = save_checkpoint(plain, tmp_path, DATA)
    with pytest.raises(TrainingError, match="no discriminator"):
        load_checkpoint(trained, without)


def test_a_newer_format_is_refused(trained, tmp_path):
    folder = save_checkpoint(trained, tmp_path, DATA)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "format_version": 99}))
    with pytest.raises(TrainingError, match="reads up to 1"):
        load_checkpoint(trained, folder)

"""Validation measures the averaged weights, can be stopped and does not affect training."""

from __future__ import annotations

import types

import pytest
import torch

from latentae.data.loader import Batch
from latentae.data.transforms import to_float, to_uint8
from latentae.measures.metrics import psnr
from latentae.models.autoencoder import AutoencoderKL
from latentae.training.loop import Validation
from latentae.training.optim import Ema
from latentae.training.training_data import LARGEST_BATCH, held_out_batches


@pytest.fixture
def trainer(small):
    """A stand-in: networks with an average that differs from them."""

    def make(**overrides):
        model = AutoencoderKL(small(**overrides).autoencoder_config())
        ema = Ema(model, 100)
        for weight in ema.weights.values():
            weight.mul_(0.9)
        return types.SimpleNamespace(
            raw_autoencoder=model,
            ema=ema,
            objective=types.SimpleNamespace(perceptual=None),
            accelerator=types.SimpleNamespace(device=torch.device("cpu")),
        )

    return make


def batch(count, channels=3, side=32):
    images = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8)
    return Batch(tuple(f"image{i}" for i in range(count)), images)


def test_the_averaged_weights_are_measured(trainer):
    trainer, batches = trainer(), [batch(3), batch(2)]
    values, picture = Validation(batches).run(trainer)
    averaged = AutoencoderKL(trainer.raw_autoencoder.config)
    averaged.load_state_dict(trainer.ema.state_dict())
    with torch.no_grad():
        made = [
            to_uint8(averaged(to_float(b.images), sample_posterior=False).reconstruction) for b in batches
        ]
    expected = torch.cat([psnr(b.images, m) for b, m in zip(batches, made, strict=True)]).mean().item()
    assert values["validation/psnr"] == pytest.approx(expected, abs=1e-4)
    assert 0 < values["validation/ssim"] < 1
    assert "validation/perceptual" not in values
    assert picture.dtype == torch.uint8
    assert picture.shape[0] == 3
    assert torch.equal(picture[:, 4:36, 4:36], batches[0].images[0])
    trainer.objective.perceptual = lambda a, b: (a - b).abs().mean(dim=(1, 2, 3))
    values, _ = Validation(batches).run(trainer)
    originals = to_float(torch.cat([b.images for b in batches]))
    apart = (originals - to_float(torch.cat(made))).abs().mean().item()
    assert values["validation/perceptual"] == pytest.approx(apart, rel=1e-5), "the recipe's own distance"


def test_training_does_not_notice(trainer):
    trainer = trainer()
    before = {name: weight.clone() for name, weight in trainer.ema.weights.items()}
    images = batch(2)
    state = torch.random.get_rng_state()
    Validation([images]).run(trainer)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert trainer.raw_autoencoder.training
    for name, weight in trainer.ema.weights.items():
        assert torch.equal(weight, before[name])
        assert not weight.is_inference()
        weight.lerp_(weight, 0.5)  # the next step can use them


def test_a_signal_ends_it_between_batches(trainer):
    asked = []

    def stop():
        asked.append(None)
        return len(asked) == 3

    assert Validation([batch(1)] * 5).run(trainer(), stop) is None
    assert len(asked) == 3


@pytest.mark.parametrize("channels", [1, 4])
def test_gray_and_transparent_images_have_a_picture_too(trainer, monkeypatch, channels):
    trainer = trainer()
    config = trainer.raw_autoencoder.config.model_copy(
        update={"in_channels": channels, "out_channels": channels}
    )
    trainer.raw_autoencoder = AutoencoderKL(config)
    trainer.ema = Ema(trainer.raw_autoencoder, 0)
    _, picture = Validation([batch(2, channels)]).run(trainer)
    assert picture.shape[0] == 3


def test_batches_are_small_however_large_the_training_batch_is(small):
    data = small(**{"data.validation": "auto", "data.validation_fraction": 0.9}).data
    batches = held_out_batches(data, 1024, 15)
    assert max(len(b.keys) for b in batches) <= LARGEST_BATCH
    assert sum(len(b.keys) for b in batches) == 15
    assert held_out_batches(data, 2, 3)[0].images.shape == (2, 3, 32, 32)


def test_no_held_out_images_are_said(small, capsys):
    assert held_out_batches(small(**{"data.validation": "none"}).data, 4, 8) == []
    assert capsys.readouterr().err == ""
    assert (
        held_out_batches(small(**{"data.validation": "auto", "data.validation_fraction": 1e-9}).data, 4, 8)
        == []
    )
    assert "held-out slice is empty" in capsys.readouterr().err

"""An AutoencoderDC through the trainer: adaptive weights, a posterior, weights to begin with."""

from __future__ import annotations

import math

import pytest
import torch

from latentae.errors import ModelError
from latentae.training.recipe import load_recipe
from latentae.training.steps import Trainer, build_autoencoder

GAN = {"loss.adversarial.weight": 0.1, "loss.adversarial.adaptive": True, "loss.adversarial.channels": 8}


@pytest.fixture
def recipe(narrow):
    plain = {"model.block_out_channels": [8, 16, 16, 32], "model.initialization": "torch", "batch_size": 2}
    return lambda **options: narrow(**plain, **options)


@pytest.mark.parametrize(("bottleneck", "checkpointing"), [("deterministic", True), ("gaussian", False)])
def test_it_trains_against_a_discriminator_with_an_adaptive_weight(
    bottleneck, checkpointing, recipe, accelerator
):
    options = {
        "model.bottleneck": bottleneck,
        "model.gradient_checkpointing": checkpointing,
        "model.decoder_noise": 0.2,
    }
    options |= {"loss.adversarial.layers": 2, "loss.adversarial.start_images": 0}
    options |= {
        "optimizer.lr": 1e-2,
        "optimizer.warmup_images": 0,
    }  # large enough for a trunk that is slower to move in fp32
    trainer = Trainer(recipe(**GAN, **options), accelerator)
    assert trainer.raw_autoencoder.config.bottleneck == bottleneck
    before = {name: p.detach().clone() for name, p in trainer.raw_autoencoder.named_parameters()}
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for _ in range(2):
        terms = trainer.update([images], report=True)
    assert all(math.isfinite(value) for value in terms.values())
    assert terms["adversarial/ratio"] > 0
    assert trainer.state.skipped == 0
    assert not [
        name for name, p in trainer.raw_autoencoder.named_parameters() if torch.equal(p, before[name])
    ]


def test_a_model_without_a_posterior_begins_a_training_with_one(recipe, tmp_path):
    gaussian = {"model.bottleneck": "gaussian", "model.initial_logvar": -4.0}
    begun = {**gaussian, "model.init_from": str(tmp_path)}
    plain = build_autoencoder(recipe(seed=3))
    plain.save_pretrained(tmp_path)
    assert plain.config.bottleneck == "deterministic"
    for options in (gaussian, begun, {**begun, "model.preset": "init"}):
        model = build_autoencoder(recipe(**options))
        torch.testing.assert_close(
            model.encode(torch.rand(1, 3, 32, 32)).logvar, torch.full((1, 4, 4, 4), -4.0)
        )
        assert torch.equal(model.encoder.conv_in.weight, plain.encoder.conv_in.weight) == (
            options != gaussian
        )
    model.save_pretrained(tmp_path / "gaussian")
    again = build_autoencoder(recipe(**{"model.init_from": str(tmp_path / "gaussian")}))
    assert again.config.bottleneck == "deterministic"
    with pytest.raises(
        ModelError, match=r"does not fit the recipe's model: .* is .* there and .* in the recipe"
    ):
        build_autoencoder(load_recipe(recipe(**begun), {"model.block_out_channels": [8, 16, 16, 16]}))

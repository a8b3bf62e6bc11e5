"""An AutoencoderDC through the trainer: adaptive weights, a posterior, frozen statistics, weights to begin with."""

from __future__ import annotations

import math

import pytest
import torch

from latentae.errors import ModelError
from latentae.models.config import AutoencoderDCConfig
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.pretrained import load_weights, save_weights
from latentae.training.ema import Ema
from latentae.training.networks import build_autoencoder
from latentae.training.recipe import load_recipe
from latentae.training.steps import Trainer

NARROW = {
    "model.block_out_channels": [8, 16, 16, 32],
    "model.latent_channels": 4,
    "batch_size": 2,
    "data.resolution": 32,
    "precision": "fp32",
    "loss.perceptual.net": "none",
}
GAN = {
    "loss.adversarial.weight": 0.1,
    "loss.adversarial.start_images": 0,
    "loss.adversarial.adaptive": True,
    "loss.adversarial.channels": 8,
    "loss.adversarial.layers": 2,
}


def recipe(**options):
    return load_recipe("dc-tiny", {**NARROW, **{name.replace("__", "."): value for name, value in options.items()}})


@pytest.mark.parametrize(("bottleneck", "checkpointing"), [("deterministic", True), ("gaussian", False)])
def test_it_trains_against_a_discriminator_with_an_adaptive_weight(bottleneck, checkpointing, accelerator):
    options = load_recipe(
        recipe(model__bottleneck=bottleneck, model__gradient_checkpointing=checkpointing, model__decoder_noise=0.2), GAN
    )
    trainer = Trainer(options, accelerator)
    assert trainer.raw_autoencoder.config.bottleneck == bottleneck
    before = {name: p.detach().clone() for name, p in trainer.raw_autoencoder.named_parameters()}
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for _ in range(2):
        terms = trainer.update([images], report=True)
    assert all(math.isfinite(value) for value in terms.values())
    assert terms["adversarial/ratio"] > 0
    assert trainer.state.skipped == 0
    assert not [name for name, p in trainer.raw_autoencoder.named_parameters() if torch.equal(p, before[name])]


def test_a_model_without_a_posterior_begins_a_training_with_one(tmp_path):
    plain = build_autoencoder(recipe(seed=3))
    assert plain.config.bottleneck == "deterministic"
    new = build_autoencoder(recipe(model__bottleneck="gaussian", model__initial_logvar=-6.0))
    torch.testing.assert_close(new.encode(torch.rand(1, 3, 32, 32)).logvar, torch.full((1, 4, 4, 4), -6.0))
    plain.save_pretrained(tmp_path)
    begun = load_recipe(recipe(model__bottleneck="gaussian", model__initial_logvar=-4.0), {"model.init_from": str(tmp_path)})
    for preset in ("dc-tiny", "init"):
        model = build_autoencoder(load_recipe(begun, {"model.preset": preset}))
        assert torch.equal(model.encoder.conv_in.weight, plain.encoder.conv_in.weight)
        torch.testing.assert_close(model.encode(torch.rand(1, 3, 32, 32)).logvar, torch.full((1, 4, 4, 4), -4.0))
    model.save_pretrained(tmp_path / "gaussian")
    again = build_autoencoder(load_recipe(recipe(), {"model.init_from": str(tmp_path / "gaussian")}))
    assert again.config.bottleneck == "deterministic"
    with pytest.raises(ModelError, match="of another shape"):
        build_autoencoder(load_recipe(begun, {"model.block_out_channels": [8, 16, 16, 16]}))


def test_an_average_has_the_stored_statistics_too(tmp_path):
    config = AutoencoderDCConfig(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), latent_channels=4, decoder_norm_types="batch_norm"
    )
    model = AutoencoderDC(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
    ema = Ema(model, 0)
    ema.update(model, 1, 1)
    save_weights(ema.state_dict(), tmp_path / "ema.safetensors")
    other = AutoencoderDC(config)
    load_weights(other, tmp_path / "ema.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    again = Ema(AutoencoderDC(config), 0)
    again.load_state_dict(ema.state_dict())
    assert again.state_dict().keys() == model.state_dict().keys()

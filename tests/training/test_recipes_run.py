"""Every shipped recipe takes a step in each of its phases, narrow and on small images."""

from __future__ import annotations

import math

import pytest
import torch

from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderDCConfig
from latentae.models.presets import preset
from latentae.training.recipe import load_recipe, shipped_recipes
from latentae.training.steps import Trainer

BACKBONE = "efficientnet-lite0"


def narrow(name, folder):
    """The recipe at 64 pixels, eight channels wide, two images a step.

    What begins late begins at once.
    """
    recipe = load_recipe(name)
    options = {"loss.classifier.backbone": BACKBONE, "loss.alignment.backbone": BACKBONE}
    options |= {"precision": "fp32", "loss.adversarial.channels": 8, "loss.adversarial.layers": 2}
    if recipe.loss.perceptual.net != "none":
        options["loss.perceptual.net"] = BACKBONE
    if recipe.model.preset == "linear":
        pass
    elif recipe.model.preset == "init":
        AutoencoderKL(preset("tiny", block_out_channels=(8, 8, 8), norm_num_groups=4)).save_pretrained(folder)
        options |= {"model.init_from": str(folder), "model.norm_num_groups": 4}
    elif isinstance(recipe.autoencoder_config(), AutoencoderDCConfig):
        config = recipe.autoencoder_config()  # a head of its attention has 32 channels
        options |= {
            "model.latent_channels": 4,
            "model.block_out_channels": [32] * len(config.encoder_block_out_channels),
        }
    else:
        options["model.norm_num_groups"] = 4
        options["model.block_out_channels"] = [8] * len(recipe.autoencoder_config().block_out_channels)
    phases = []
    for phase in load_recipe(recipe, options).phase_recipes():
        changes = {"batch_size": 2, "data.resolution": 64, "loss.adversarial.start_images": 0}
        phases.append(load_recipe(phase, changes))
    return phases


def named(phase):
    """The log's names of a recipe's terms."""
    loss = phase.loss
    asked = {name: getattr(loss, name) for name in ("l1", "l2", "wavelet", "bce", "spectrum")}
    asked |= {
        name: getattr(loss, name).weight for name in ("classifier", "alignment", "sparsity", "contractive")
    }
    asked |= {"perceptual": loss.perceptual.net != "none", "downscaled": loss.equivariance.downscaled}
    asked |= dict.fromkeys(("adversarial", "discriminator"), loss.adversarial.weight)
    return [name for name, weight in asked.items() if weight]


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_takes_a_step_in_every_phase(name, tmp_path, accelerator):
    for phase in narrow(name, tmp_path / "begin"):
        trainer = Trainer(phase, accelerator)
        before = {k: v.clone() for k, v in trainer.raw_autoencoder.state_dict().items()}
        channels = phase.data.channels
        assert (
            channels
            == trainer.raw_autoencoder.config.in_channels
            == trainer.raw_autoencoder.config.out_channels
        )
        images = torch.randint(
            0, 256, (2, channels, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        terms = trainer.update([images], report=True)
        assert all(math.isfinite(value) for value in terms.values()), terms
        assert trainer.state.skipped == 0
        assert {f"loss/{name}" for name in named(phase)} <= terms.keys()
        assert ("adversarial/ratio" in terms) == phase.loss.adversarial.adaptive
        after = trainer.raw_autoencoder.state_dict()
        moved = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
        encoder = {"encoder", "quant_conv"} & before.keys() | {"encoder"}
        assert bool(moved & encoder) == (phase.model.train in ("all", "encoder", "latent"))
        accelerator.free_memory()

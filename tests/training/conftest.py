from __future__ import annotations

import gc

import pytest
import torch

from latentae.data.shards import write_shards
from latentae.data.shrinking import encode_png
from latentae.training.launch import build_accelerator, close_accelerator
from latentae.training.recipe import load_recipe
from latentae.training.train import train

SMALL = {
    "model.block_out_channels": [8, 8, 8],
    "model.norm_num_groups": 4,
    "loss.perceptual.net": "none",
    "data.resolution": 32,
    "data.validation": "none",
    "batch_size": 4,
    "images": 24,
    "checkpoint_every_images": 8,
    "log.tensorboard": False,
    "log.summary": False,
}


NARROW = {
    "model.block_out_channels": [12, 24, 48, 192],
    "model.latent_channels": 4,
    "loss.perceptual.net": "none",
    "data.resolution": 32,
    "data.validation_fraction": 0.2,
    "batch_size": 4,
    "images": 16,
    "checkpoint_every_images": 8,
    "log.tensorboard": False,
    "log.summary": False,
    "optimizer.name": "adamw",
    "optimizer.lr": 1e-4,
}


@pytest.fixture(scope="session", autouse=True)
def _few_objects():
    """Every accelerator that closes collects garbage.

    The objects of loaded modules, a few hundred thousand, are left out of it.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """24 smooth random images of 40 x 48 pixels in two shards."""
    generator = torch.Generator().manual_seed(0)
    out = tmp_path_factory.mktemp("data") / "shards"

    def samples():
        for index in range(24):
            coarse = torch.rand(1, 3, 5, 6, generator=generator)
            image = torch.nn.functional.interpolate(coarse, size=(40, 48), mode="bilinear")[0]
            yield {"__key__": f"photo{index:02}", "png": encode_png((image * 255).to(torch.uint8))}

    write_shards(samples(), out, shard_size=12)
    return out


@pytest.fixture(scope="session")
def small(shards):
    """A recipe that runs in a second."""

    def make(**overrides):
        return load_recipe("tiny-cpu", {**SMALL, "data.shards": str(shards), **overrides})

    return make


@pytest.fixture(scope="session")
def narrow(shards):
    """A recipe of a narrow AutoencoderDC that begins at PCA."""

    def make(**overrides):
        return load_recipe("dc-tiny", {**NARROW, "data.shards": str(shards), **overrides})

    return make


@pytest.fixture(scope="session")
def whole_run(small, tmp_path_factory):
    """A finished run of the small recipe, not to be changed."""
    return train(small(), tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def accelerator():
    accelerator = build_accelerator("fp32")
    yield accelerator
    close_accelerator(accelerator)

"""Two gloo processes equal one with the whole batch, for both optimizers, with accumulation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("ddp_worker.py")


ADVERSARIAL = {"loss.adversarial.weight": 0.3, "loss.adversarial.channels": 8, "loss.adversarial.layers": 2, "loss.kl": 1e-3}
EFFICIENTNET = "efficientnet-lite0"
CASES = {
    "plain": {},
    "accumulated, with all that is averaged over processes": {
        "gradient_accumulation": 2,
        "loss.learn_logvar": True,
        "loss.adversarial.lecam": 0.1,
        "loss.adversarial.r1": 0.1,
        "loss.adversarial.penalty_every": 2,
        "model.latent_noise": 1.0,
    },
    "adaptive weights, an alignment and its projection": {
        "loss.adversarial.adaptive": True,
        "loss.alignment.weight": 0.1,
        "loss.alignment.backbone": EFFICIENTNET,
        "loss.learn_logvar": True,
    },
    "corrupted images and latents with learned fills, accumulated": {
        "gradient_accumulation": 2,
        "corruption.noise": [0.1, 0.5],
        "corruption.mask": [0.3, 0.6],
        "corruption.mask_loss": "hidden",
        "model.latent_mask": 0.7,
        "model.nested_channels": 2,
        "loss.equivariance.probability": 0.7,
        "loss.equivariance.smallest_scale": 0.5,
        "loss.equivariance.downscaled": 0.25,
        "loss.equivariance.factors": [2],
    },
    "penalties on the latent that look at the whole batch": {
        "loss.sparsity.weight": 0.3,
        "loss.sparsity.kind": "kl",
        "loss.free_bits": 0.5,
        "loss.contractive.weight": 0.1,
        "loss.spectrum": 0.1,
    },
    "decoder only, heads on frozen features": {
        "model.train": "decoder",
        "loss.adversarial.discriminator": "features",
        "loss.adversarial.backbone": EFFICIENTNET,
    },
    "decoder head, U-Net, accumulated": {
        "model.train": "decoder-head",
        "gradient_accumulation": 2,
        "loss.adversarial.discriminator": "unet",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, small, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(small(batch_size=8, **{**ADVERSARIAL, **CASES[case]}).toml())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, start in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        command = [sys.executable, *start, str(WORKER), str(recipe), str(tmp_path / name)]
        subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment)
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert one.keys() == two.keys()
    for key in one:
        # Adam turns last-bit differences of tiny gradients into differences of the size of a step
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=2e-4, msg=lambda m, key=key: f"{key}: {m}")

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


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_equal_one(accumulation, small, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        small(
            batch_size=8,
            gradient_accumulation=accumulation,
            **{"loss.adversarial.weight": 0.3, "loss.adversarial.channels": 8, "loss.adversarial.layers": 2, "loss.kl": 1e-3},
        ).toml()
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, start in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        command = [sys.executable, *start, str(WORKER), str(recipe), str(tmp_path / name)]
        subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment)
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert one.keys() == two.keys()
    for key in one:
        # Adam turns last-bit differences of tiny gradients into differences of the size of a step
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=2e-4, msg=lambda m, key=key: f"{key}: {m}")

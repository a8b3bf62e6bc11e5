"""torch.compile of the networks: the same training, and a signal is heard while it compiles."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

import latentae
from latentae.training.checkpoint import find_checkpoint
from latentae.training.steps import build_autoencoder

CUT = {  # everything that reaches into the passes: ratios at both last layers, a discriminator
    "loss.adversarial.weight": 0.1,
    "loss.adversarial.adaptive": True,
    "loss.adversarial.channels": 8,
    "loss.adversarial.layers": 1,
    "loss.alignment.weight": 0.1,
    "loss.alignment.backbone": "efficientnet-lite0",
    "optimizer.warmup_images": 0,
    "images": 8,
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler: g++ or clang++"
    ),
]


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch's own, while it traces
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_training_equals_eager(small, tmp_path):
    eager = latentae.train(small(**CUT), tmp_path / "eager")
    compiled = latentae.train(small(**CUT, compile=True), tmp_path / "compiled")
    start = build_autoencoder(small(**CUT)).state_dict()
    expected, found = (
        load_file(find_checkpoint(run) / "autoencoder.safetensors") for run in (eager, compiled)
    )
    for name, value in expected.items():
        # a step has the size of the learning rate for the smallest gradient too, so single weights
        # may go the other way
        assert (found[name] - value).norm() <= 0.05 * (value - start[name]).norm(), name


def test_a_signal_ends_compilation_at_once(small, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(small(compile=True, images=400).toml())
    command = [sys.executable, "-m", "latentae", "train", str(recipe), "--output", str(tmp_path / "run")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "compiling" in line:
                break
        time.sleep(3)
        process.send_signal(signal.SIGUSR1)
        start = time.monotonic()
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 75, said
    assert "before the first step" in said
    assert time.monotonic() - start < 60
    assert find_checkpoint(tmp_path / "run") is None

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from latentae import AutoencoderKL, AutoencoderKLConfig
from latentae.errors import MissingDependencyError, ModelError, RecipeError
from latentae.exporting import pt2
from latentae.exporting.pt2 import write_pt2
from latentae.models.config import preset

NARROW = AutoencoderKLConfig(block_out_channels=(8,), norm_num_groups=4, mid_block_add_attention=False)
SHAPES = {
    "f8": preset("kl-f8", block_out_channels=(8, 8, 16, 16), norm_num_groups=4),
    "f4": preset("kl-f4", block_out_channels=(8, 8, 16), norm_num_groups=4, mid_block_add_attention=False, use_quant_conv=False),
}
READER = """
import json, sys
import torch
from safetensors.torch import load_file

sys.modules["latentae"] = sys.modules["latentae_kernels"] = None  # an import of either is an error
folder = sys.argv[1]
tensors = load_file(f"{folder}/tensors.safetensors")
for name in ("encoder", "decoder"):
    run = torch._inductor.aoti_load_package(f"{folder}/pt2/{name}.pt2")
    assert json.loads(run.get_metadata()["config"])["_class_name"] == "AutoencoderKL"
    for index in range(4):
        x, expected = tensors[f"{name}.{index}.in"], tensors[f"{name}.{index}.out"]
        torch.testing.assert_close(run(x), expected, rtol=0, atol=1e-4)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_alone_loads_the_packages_and_gives_the_same(shape, tmp_path):
    """At batches of 1, 2, 3 and 65, and at sizes that were not seen at export."""
    model = AutoencoderKL(SHAPES[shape]).eval()
    write_pt2(model, model.config, tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"pt2", "pt2/encoder.pt2", "pt2/decoder.pt2"}
    f, z = model.config.downsampling, model.config.latent_channels
    tensors = {}
    for index, (batch, height, width) in enumerate([(1, 5, 2), (3, 2, 7), (65, 3, 2), (2, 6, 9)]):
        tensors[f"encoder.{index}.in"] = images = torch.randn(batch, 3, f * height, f * width)
        tensors[f"decoder.{index}.in"] = latents = torch.randn(batch, z, height, width)
        with torch.no_grad():
            posterior = model.encode(images)
            tensors[f"encoder.{index}.out"] = torch.cat([posterior.mean, posterior.logvar], dim=1)
            tensors[f"decoder.{index}.out"] = model.decode(latents)
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "tensors.safetensors")
    done = subprocess.run([sys.executable, "-c", READER, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_no_compiler_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # nothing compiled before may be found
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, str(tmp_path / "no-such-compiler")))
    with pytest.raises(MissingDependencyError, match=r"AOTInductor could not compile .*; install g\+\+ or clang\+\+"):
        write_pt2(AutoencoderKL(NARROW), NARROW, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_package_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    def build(program, path, config):
        path.write_bytes(b"package")
        return lambda x: program.module()(x) + 0.01

    monkeypatch.setattr(pt2, "_build", build)
    with pytest.raises(ModelError, match=r"encoder\.pt2 is off by 0\.0.*, allowed is 0\.0001"):
        write_pt2(AutoencoderKL(NARROW), NARROW, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_unknown_device_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="unknown device 'quantum'"):
        write_pt2(AutoencoderKL(NARROW), NARROW, tmp_path, device="quantum")

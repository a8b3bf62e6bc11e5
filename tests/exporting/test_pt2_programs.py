from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentae import AutoencoderKL, AutoencoderKLConfig
from latentae.errors import MissingDependencyError, ModelError, RecipeError
from latentae.exporting.programs import write_pt2
from latentae.models.presets import preset

NARROW = AutoencoderKLConfig(
    block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
)
F8 = preset("kl-f8", block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=1)
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


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.usefixtures("cpp_compiler")
def test_torch_alone_loads_the_packages_and_gives_the_same(tmp_path):
    """At batches of 1, 2, 3 and 65, and at sizes that were not seen at export."""
    model = AutoencoderKL(F8).eval()
    write_pt2(model, model.config, tmp_path)
    assert files(tmp_path) == {"pt2/encoder.pt2", "pt2/decoder.pt2"}
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
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_no_compiler_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache")
    )  # nothing compiled before may be found
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, str(tmp_path / "no-such-compiler")))
    with pytest.raises(
        MissingDependencyError, match=r"AOTInductor could not compile .*; install g\+\+ or clang\+\+"
    ):
        write_pt2(AutoencoderKL(NARROW), NARROW, tmp_path / "out")
    assert not files(tmp_path / "out")


def test_a_package_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    """torch's compiler is replaced: its package is empty, and what it loads is the program with an
    error.
    """
    programs, error = [], 0.0

    def compile_package(program, package_path, inductor_configs):
        assert (
            json.loads(inductor_configs["aot_inductor.metadata"]["config"])["_class_name"] == "AutoencoderKL"
        )
        programs.append(program.module())
        Path(package_path).write_bytes(b"package")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_package)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: lambda x: programs[-1](x) + error)
    write_pt2(AutoencoderKL(NARROW), NARROW, tmp_path / "exact")
    assert files(tmp_path / "exact") == {"pt2/encoder.pt2", "pt2/decoder.pt2"}
    error = 0.01
    with pytest.raises(ModelError, match=r"encoder\.pt2 is off by 0\.0.*, allowed is 0\.0001"):
        write_pt2(AutoencoderKL(NARROW), NARROW, tmp_path / "off")
    assert not files(tmp_path / "off")


def test_an_unknown_device_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="unknown device 'quantum'"):
        write_pt2(AutoencoderKL(NARROW), NARROW, tmp_path, device="quantum")

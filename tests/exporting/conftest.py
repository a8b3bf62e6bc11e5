from __future__ import annotations

import importlib
import logging
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentae import AutoencoderKL, export
from latentae.data.shards import shards
from latentae.models.config import AutoencoderKLConfig
from latentae.models.presets import preset


def write_photos(folder: Path, count: int, side: int) -> Path:
    """Coloured gradients with a little noise, compressible as photos are, as PNG files."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    images = (
        ((smooth + 0.03 * torch.randn(count, 3, side, side, generator=generator)).clamp(0, 1) * 255)
        .round()
        .to(torch.uint8)
    )
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(
            folder / f"{number:03}.png"
        )
    return folder


@pytest.fixture(scope="session")
def photo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with 6 images of 96 x 96 pixels."""
    root = tmp_path_factory.mktemp("photos")
    shards(write_photos(root / "photos", 6, 96), root / "shards")
    return root / "shards"


@pytest.fixture(scope="session")
def diffusers() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what diffusers' own imports warn of is not ours
        module = importlib.import_module("diffusers")
        assert module.AutoencoderKL
        assert module.AutoencoderDC
    return module


@pytest.fixture(scope="session")
def save_model() -> Callable[..., Path]:
    """`save_model(folder, config)` saves a random AutoencoderKL that decodes to about [-1, 1], as a
    trained one does.
    """

    def save(folder: Path, config: AutoencoderKLConfig, seed: int = 0) -> Path:
        torch.manual_seed(seed)
        model = AutoencoderKL(config).to(memory_format=torch.channels_last)  # as training leaves it
        with torch.no_grad():
            model.decoder.conv_out.weight.div_(5)
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def load_quietly(diffusers, caplog, capfd) -> Callable[[type, Path], Any]:
    """Loads a folder with a class of diffusers: no missing, unexpected or renamed key, no warning
    and no log line.
    """

    def load(kind: type, folder: Path) -> Any:
        capfd.readouterr()
        diffusers.utils.logging.set_verbosity_warning()
        diffusers.utils.logging.enable_propagation()
        with caplog.at_level(logging.WARNING):
            model, report = kind.from_pretrained(
                folder, output_loading_info=True, low_cpu_mem_usage=False, local_files_only=True
            )
        assert not any(report.values())
        assert not caplog.records
        assert not capfd.readouterr().err
        return model.eval()

    return load


@pytest.fixture
def run_snippets(monkeypatch) -> Callable[..., list[dict[str, Any]]]:
    """Runs the Python snippets of an export's card one after the other, as a reader would: the
    names after each.
    """

    def run(folder: Path, images: torch.Tensor) -> list[dict[str, Any]]:
        monkeypatch.chdir(folder.parent)
        names: dict[str, Any] = {"images": images}
        found = []
        for code in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="diffusers|transformers|huggingface_hub")  # not ours
                exec(code, names)
            found.append(dict(names))
        return found

    return run


@pytest.fixture(scope="session")
def cpp_compiler() -> None:
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("a pt2 package needs a C++ compiler: g++ or clang++")


@pytest.fixture(scope="session")
def onnx_run() -> Callable[[Path, torch.Tensor], torch.Tensor]:
    """Runs an ONNX file on one tensor in ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")

    def run(file: Path, x: torch.Tensor) -> torch.Tensor:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

    return run


@pytest.fixture(scope="session")
def onnx_export(save_model, tmp_path_factory) -> tuple[AutoencoderKL, Path]:
    """A model with attention in two levels, and its export in ONNX."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    config = preset(
        "kl-f4",
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    root = tmp_path_factory.mktemp("onnx")
    export(
        save_model(root / "model", config), root / "vae", format="onnx", scaling_factor=0.5, shift_factor=0.1
    )
    return AutoencoderKL.from_pretrained(root / "model"), root / "vae"

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentae.data.writing import shards
from latentae.evaluation.evaluate import evaluate
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig


def smooth_images(count: int, size: int, seed: int = 0) -> Tensor:
    """Coloured gradients with a little noise: compressible as photos are; uint8 [N, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    noise = 0.03 * torch.randn(count, 3, size, size, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def write_images(folder: Path, images: Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(folder / f"{number:03}.png")
    return folder


def tiny_model(**overrides: object) -> AutoencoderKL:
    values = {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 32,
        "mid_block_add_attention": False,
    }
    torch.manual_seed(0)
    return AutoencoderKL(AutoencoderKLConfig(**{**values, **overrides}))  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="session", name="smooth_images")
def _smooth_images() -> Callable[..., Tensor]:
    return smooth_images


@pytest.fixture(scope="session", name="write_images")
def _write_images() -> Callable[[Path, Tensor], Path]:
    return write_images


@pytest.fixture(scope="session", name="tiny_model")
def _tiny_model() -> Callable[..., AutoencoderKL]:
    return tiny_model


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, held-out shards (5 images) and training shards (20 images in 2 shards)."""
    root = tmp_path_factory.mktemp("evaluation")
    tiny_model().save_pretrained(root / "model")
    shards(write_images(root / "held <b>&", smooth_images(5, 48)), root / "held_out")
    shards(write_images(root / "seen", smooth_images(20, 48, seed=1)), root / "training", shard_size=10)
    return root


@pytest.fixture(scope="session")
def evaluation(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and result of one evaluation with everything in it, on the images of `workspace`."""
    run, out = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("out") / "evaluation"
    shutil.copytree(workspace / "model", run / "model")
    options = {"pca_shards": workspace / "training", "perceptual": "none", "frechet": "none", "batch_size": 2}
    return out, evaluate(run / "model", workspace / "held_out", out=out, **options)

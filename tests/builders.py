"""Small images and models that tests of several packages use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig


def smooth_images(count: int, size: int, seed: int = 0) -> Tensor:
    """Color gradients with a little noise, compressible like photos; uint8 [N, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    noise = 0.03 * torch.randn(count, 3, size, size, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def write_images(folder: Path, images: Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(
            folder / f"{number:03}.png"
        )
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

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentae.data.writing import shards


def write_photos(folder: Path, count: int, side: int) -> Path:
    """Coloured gradients with a little noise, compressible as photos are, as PNG files."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    images = ((smooth + 0.03 * torch.randn(count, 3, side, side, generator=generator)).clamp(0, 1) * 255).round().to(torch.uint8)
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture(scope="session")
def photo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with 6 images of 96 x 96 pixels."""
    root = tmp_path_factory.mktemp("photos")
    shards(write_photos(root / "photos", 6, 96), root / "shards")
    return root / "shards"

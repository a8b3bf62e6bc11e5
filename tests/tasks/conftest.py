from __future__ import annotations

from pathlib import Path

import pytest
import torch
from digit_files import pca_model, write_images
from sklearn.datasets import load_digits
from torch import Tensor


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """uint8 [1797, 1, 8, 8] and their classes."""
    pixels, classes = load_digits(return_X_y=True)
    return torch.from_numpy(pixels / 16 * 255).round().to(torch.uint8).view(-1, 1, 8, 8), torch.from_numpy(
        classes
    )


@pytest.fixture(scope="session")
def made(
    digits: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Tensor]:
    """A PCA of every second digit, and 150 other ones as files with classes, and as a tensor."""
    folder, (images, classes) = tmp_path_factory.mktemp("digits"), digits
    some = slice(1, 301, 2)
    inputs = write_images(folder / "digits", images[some], classes[some].tolist())
    return pca_model(folder / "model", images[::2], 12), inputs, images[some]

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from latentae.models.config import LinearAutoencoderConfig
from latentae.models.linear import LinearAutoencoder
from latentae.models.pca import fit_pca


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """uint8 [1797, 1, 8, 8] and their classes."""
    pixels, classes = load_digits(return_X_y=True)
    return torch.from_numpy(pixels / 16 * 255).round().to(torch.uint8).view(-1, 1, 8, 8), torch.from_numpy(classes)


@pytest.fixture(scope="session")
def pca_model() -> Callable[[Path, Tensor, int], Path]:
    """Save the linear autoencoder that is PCA of gray images of 8 x 8: it needs no training."""

    def make(folder: Path, images: Tensor, components: int) -> Path:
        config = LinearAutoencoderConfig(in_channels=1, out_channels=1, latent_channels=components, patch=8, sample_size=8)
        model = LinearAutoencoder(config)
        model.load_pca(fit_pca(images, 8, components))
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def write_digits() -> Callable[..., Path]:
    """Write gray images as PNG files, with a class file beside each."""

    def write(folder: Path, images: Tensor, classes: Iterable[int] | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            Image.fromarray(image[0].numpy()).save(folder / f"{number:04}.png")
        for number, label in enumerate([] if classes is None else classes):
            (folder / f"{number:04}.cls").write_text(str(int(label)))
        return folder

    return write

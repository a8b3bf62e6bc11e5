"""Images as files, and a linear autoencoder that is their PCA, which needs no training."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from latentae.models.config import LinearAutoencoderConfig
from latentae.models.linear import LinearAutoencoder
from latentae.models.pca import fit_pca
from latentae.tasks.outputs import NOTE


def pca_model(folder: Path, images: Tensor, components: int) -> Path:
    """Save PCA of the 8 x 8 patches of images."""
    channels, size = images.shape[1:3]
    shape = {"in_channels": channels, "out_channels": channels, "sample_size": size}
    model = LinearAutoencoder(LinearAutoencoderConfig(**shape, latent_channels=components, patch=8))
    model.load_pca(fit_pca(images, 8, components))
    model.save_pretrained(folder)
    return folder


def write_images(folder: Path, images: Tensor, classes: Iterable[int] = ()) -> Path:
    """Write images as PNG files, each with a class file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy().squeeze())).save(
            folder / f"{number:04}.png"
        )
    for number, label in enumerate(classes):
        (folder / f"{number:04}.cls").write_text(str(int(label)))
    return folder


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).copy()


def note(file: Path) -> dict[str, Any]:
    """The JSON of the PNG's text chunk."""
    with PngImageFile(file) as image:
        return json.loads(image.text[NOTE])

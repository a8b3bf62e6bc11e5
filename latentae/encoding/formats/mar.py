"""MAR: mean and log-variance (not standard deviation) of each image and of its mirror image, in a folder for each class.

    00007/00000000.npz   moments, moments_flip [2z, h, w] fp32: mean, then logvar

The reader numbers the classes by the order of their folders, so the folders are the labels with leading zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from latentae.encoding.formats.layout import Layout, npz, require_flips, require_labels, require_one_size
from latentae.encoding.latents import LatentDataset
from latentae.errors import DataError

__all__ = ["OPTIONS", "build", "check", "target"]

OPTIONS: dict[str, Any] = {}


def check(dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Whether the latents can be written so."""
    require_one_size(dataset, "mar")
    require_flips(dataset, "mar")
    require_labels(dataset, "mar")
    classes = np.unique(dataset.labels)
    gap = next((number for number, label in enumerate(classes) if number != label), None)
    if gap is not None:
        raise DataError(
            f"mar numbers the classes by the order of their folders, and class {gap} has no sample ({len(classes)} classes up to "
            f"{classes[-1]}), so that the labels would shift; number the classes from 0 without gaps"
        )


def target(options: dict[str, Any]) -> str:
    """What the trainer is given."""
    return "."


def build(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write everything."""
    for rows in layout.shards():
        for index in rows:
            arrays = {
                "moments": _moments(dataset, index, False),
                "moments_flip": _moments(dataset, index, True),
            }
            layout.put(f"{dataset.labels[index]:05}/{index:08}.npz", npz(arrays))


def _moments(dataset: LatentDataset, index: int, flip: bool) -> np.ndarray:
    latent = dataset.posterior(index, flip=flip)
    return np.concatenate([latent.mean.numpy(), latent.logvar.numpy()])

"""MAR: mean and log-variance (not standard deviation) of images and flips, one folder per class.

    00007/00000000.npz   moments, moments_flip [2z, h, w] fp32: mean, then logvar

The reader numbers classes by the order of their folders, so folders are labels with leading zeros.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from latentae.encoding.formats.layout import Layout, npz
from latentae.encoding.latent_dataset import LatentDataset
from latentae.errors import DataError

__all__ = ["OPTIONS", "build", "check"]

OPTIONS: dict[str, Any] = {}


def check(dataset: LatentDataset, out: Path, options: dict[str, Any]) -> None:
    """Check that classes are numbered without gaps; DataError if not."""
    classes = np.unique(dataset.labels)
    gap = next((number for number, label in enumerate(classes) if number != label), None)
    if gap is not None:
        raise DataError(
            f"mar numbers classes by the order of their folders, but class {gap} has no sample "
            f"({len(classes)} classes up to {classes[-1]}), which would shift the labels; "
            "number classes from 0 without gaps"
        )


def build(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write all files."""
    for index in layout.samples():
        arrays = {}
        for name, flip in (("moments", False), ("moments_flip", True)):
            latent = dataset.posterior(index, flip=flip)
            arrays[name] = np.concatenate([latent.mean.numpy(), latent.logvar.numpy()])
        layout.put(f"{dataset.labels[index]:05}/{index:08}.npz", npz(arrays))

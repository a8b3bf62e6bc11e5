"""fast-DiT: one file per sample, drawn and scaled, and one file per label.

    imagenet256_features/i.npy   [1, z, h, w] fp32: z * scaling
    imagenet256_labels/i.npy     [1] int64

The trainer fixes the folder names for all data sets. Latents are not shifted: decode z / scaling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from latentae.encoding.formats.layout import Layout, draw, npy
from latentae.encoding.latent_dataset import LatentDataset
from latentae.errors import OutputError

__all__ = ["OPTIONS", "build", "check"]

OPTIONS: dict[str, Any] = {"seed": 0, "scaling": None}


def check(dataset: LatentDataset, out: Path, options: dict[str, Any]) -> None:
    """Set the default scaling; OutputError if there is none."""
    if options["scaling"] is None:
        options["scaling"] = dataset.statistics["scaling_factor"]
    if options["scaling"] is None:
        raise OutputError("the latents are constant, so they have no scaling factor; give one")


def build(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write all files."""
    for index in layout.samples():
        latent = draw(dataset, index, options["seed"]) * options["scaling"]
        layout.put(f"imagenet256_features/{index}.npy", npy(latent[None].numpy()))
        layout.put(f"imagenet256_labels/{index}.npy", npy(np.array([dataset.labels[index]], np.int64)))

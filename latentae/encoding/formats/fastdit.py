"""fast-DiT: each sample, drawn and scaled, in a file of its own, and its label in another.

    imagenet256_features/i.npy   [1, z, h, w] fp32: z * scaling
    imagenet256_labels/i.npy     [1] int64

The names of the folders are the trainer's, whatever the data. Nothing is shifted: decode with z / scaling.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from latentae.encoding.formats.layout import Layout, draw, npy, require_labels, require_one_size
from latentae.encoding.latents import LatentDataset
from latentae.errors import OutputError

__all__ = ["OPTIONS", "build", "check", "target"]

OPTIONS: dict[str, Any] = {"seed": 0, "scaling": None}


def check(dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Whether the latents can be written so; sets the scaling that is not given."""
    require_one_size(dataset, "fastdit")
    require_labels(dataset, "fastdit")
    if options["scaling"] is None:
        options["scaling"] = dataset.statistics["scaling_factor"]
    if options["scaling"] is None:
        raise OutputError("the latents do not vary, so they have no scaling factor; give one")


def target(options: dict[str, Any]) -> str:
    """What the trainer is given."""
    return "."


def build(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write everything."""
    for rows in layout.shards():
        for index in rows:
            latent = draw(dataset, index, options["seed"]) * options["scaling"]
            layout.put(f"imagenet256_features/{index}.npy", npy(latent[None].numpy()))
            layout.put(f"imagenet256_labels/{index}.npy", npy(np.array([dataset.labels[index]], np.int64)))

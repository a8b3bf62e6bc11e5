"""EDM2: mean and standard deviation (not log-variance) of each latent in an npy file, in a zip or a folder.

    00000/img-mean-std-00000000.npy   [2z, h, w] fp32: mean, then std
    dataset.json                      {"labels": [[path, label], ...]}

EDM2's own autoencoder takes images in [0, 1] and ours take [-1, 1]: decode what the trainer makes with the autoencoder that encoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np

from latentae.encoding.formats.layout import Layout, npy, require_labels, require_one_size
from latentae.encoding.latents import LatentDataset

__all__ = ["OPTIONS", "build", "check", "labels_json", "mean_std", "name_of", "target"]

OPTIONS: dict[str, Any] = {"folder": False}
ZIP = "latents.zip"


def check(dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Whether the latents can be written so."""
    require_one_size(dataset, "edm2")
    require_labels(dataset, "edm2")


def target(options: dict[str, Any]) -> str:
    """What the trainer is given."""
    return "." if options["folder"] else ZIP


def build(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write everything; a zip, which is one file, begins anew after a stop."""
    if options["folder"]:
        for rows in layout.shards():
            for index in rows:
                layout.put(name_of(index), npy(mean_std(dataset, index)))
        layout.put("dataset.json", labels_json(dataset))
        return
    files = ((name_of(index), npy(mean_std(dataset, index))) for index in layout.samples())
    layout.put_zip(ZIP, chain(files, [("dataset.json", labels_json(dataset))]))


def name_of(index: int, stem: str = "img-mean-std-") -> str:
    """The file of a sample."""
    return f"{index // 1000:05}/{stem}{index:08}.npy"


def mean_std(dataset: LatentDataset, index: int) -> np.ndarray:
    """[2z, h, w] fp32."""
    latent = dataset.posterior(index)
    return np.concatenate([latent.mean.numpy(), (0.5 * latent.logvar).exp().numpy()])


def labels_json(dataset: LatentDataset, names: Iterable[str] | None = None) -> bytes:
    """`dataset.json`: path and label of every sample."""
    names = names or map(name_of, range(len(dataset)))
    return json.dumps(
        {"labels": [[name, int(label)] for name, label in zip(names, dataset.labels, strict=True)]}
    ).encode()

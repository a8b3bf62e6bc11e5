"""EDM2: mean and standard deviation (not log-variance) of each latent as npy, in a zip or a folder.

    00000/img-mean-std-00000000.npy   [2z, h, w] fp32: mean, then std
    dataset.json                      {"labels": [[path, label], ...]}

EDM2's own autoencoder takes images in [0, 1], ours [-1, 1]: decode samples with the same model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np

from latentae.encoding.formats.layout import Layout, npy
from latentae.encoding.latent_dataset import LatentDataset

__all__ = ["OPTIONS", "ZIP", "build", "labels_json", "mean_std", "name_of"]

OPTIONS: dict[str, Any] = {"folder": False}
ZIP = "latents.zip"


def build(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write all files. An interrupted zip starts again."""
    if options["folder"]:
        for index in layout.samples():
            layout.put(name_of(index), npy(mean_std(dataset, index)))
        layout.put("dataset.json", labels_json(dataset))
        return
    files = ((name_of(index), npy(mean_std(dataset, index))) for index in layout.samples(resume=False))
    layout.put_zip(ZIP, chain(files, [("dataset.json", labels_json(dataset))]))


def name_of(index: int, stem: str = "img-mean-std-") -> str:
    """The file name of a sample."""
    return f"{index // 1000:05}/{stem}{index:08}.npy"


def mean_std(dataset: LatentDataset, index: int) -> np.ndarray:
    """Mean and standard deviation of a latent, [2z, h, w] fp32."""
    latent = dataset.posterior(index)
    return np.concatenate([latent.mean.numpy(), (0.5 * latent.logvar).exp().numpy()])


def labels_json(dataset: LatentDataset, names: Iterable[str] | None = None) -> bytes:
    """`dataset.json`: path and label of every sample."""
    names = names or map(name_of, range(len(dataset)))
    labels = [[name, int(label)] for name, label in zip(names, dataset.labels, strict=True)]
    return json.dumps({"labels": labels}).encode()

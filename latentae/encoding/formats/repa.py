"""REPA: images, and mean and standard deviation (not log-variance), paired by the order of names.

images/00000/img00000000.png   the encoded crop, for the features that REPA aligns to
vae-sd/00000/img00000000.npy   [2z, h, w] fp32: mean, then std
.../dataset.json               {"labels": [[path, label], ...]} in both folders
"""

from __future__ import annotations

from typing import Any

from latentae.data.decode import decode_image
from latentae.data.shrinking import encode_png
from latentae.data.transforms import crop_to_bucket
from latentae.encoding.formats.edm2 import labels_json, mean_std, name_of
from latentae.encoding.formats.layout import Layout, npy
from latentae.encoding.latent_dataset import LatentDataset
from latentae.encoding.latent_shard import JSON_MEMBER

__all__ = ["OPTIONS", "build"]

OPTIONS: dict[str, Any] = {}
STEM = "img"


def build(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write all files."""
    height, width = map(int, dataset.sizes[0])
    for index in layout.samples():
        extension, name = dataset.meta(index)[JSON_MEMBER]["source"], name_of(index, STEM)
        member = f"{dataset.keys[index]}.{extension}"
        data = dataset.members(index)[extension]
        image = decode_image(data, member, max_pixels=None, short=max(height, width))
        layout.put(f"images/{_png(name)}", encode_png(crop_to_bucket(image, (height, width))))
        layout.put(f"vae-sd/{name}", npy(mean_std(dataset, index)))
    names = [name_of(index, STEM) for index in range(len(dataset))]
    layout.put("vae-sd/dataset.json", labels_json(dataset, names))
    layout.put("images/dataset.json", labels_json(dataset, map(_png, names)))


def _png(name: str) -> str:
    return name.removesuffix(".npy") + ".png"

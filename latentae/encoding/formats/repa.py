"""REPA: images beside mean and standard deviation (not log-variance), paired by the order of their names.

images/00000/img00000000.png   the part of the image that was encoded, for the features that it is aligned to
vae-sd/00000/img00000000.npy   [2z, h, w] fp32: mean, then std
.../dataset.json               {"labels": [[path, label], ...]} in both folders; the reader takes the one in vae-sd
"""

from __future__ import annotations

from typing import Any

from latentae.data.decode import decode_image
from latentae.data.shrinking import encode_png
from latentae.data.transforms import crop_to_bucket
from latentae.encoding.formats.edm2 import labels_json, mean_std, name_of
from latentae.encoding.formats.layout import Layout, npy, require_labels, require_one_size
from latentae.encoding.latents import LatentDataset
from latentae.encoding.places import JSON_MEMBER
from latentae.errors import OutputError

__all__ = ["OPTIONS", "build", "check", "target"]

OPTIONS: dict[str, Any] = {}
STEM = "img"


def check(dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Whether the latents can be written so."""
    require_one_size(dataset, "repa")
    require_labels(dataset, "repa")
    if dataset.meta(0)[JSON_MEMBER]["source"] not in dataset.members(0):
        raise OutputError(
            "repa reads the images too, and they were not kept; encode again with --keep-images"
        )


def target(options: dict[str, Any]) -> str:
    """What the trainer is given."""
    return "."


def build(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write everything."""
    size = require_one_size(dataset, "repa")
    for rows in layout.shards():
        for index in rows:
            extension, name = dataset.meta(index)[JSON_MEMBER]["source"], name_of(index, STEM)
            name_in_shard = f"{dataset.keys[index]}.{extension}"
            image = decode_image(
                dataset.members(index)[extension], name_in_shard, max_pixels=None, short=max(size)
            )
            layout.put(f"images/{_png(name)}", encode_png(crop_to_bucket(image, size)))
            layout.put(f"vae-sd/{name}", npy(mean_std(dataset, index)))
    names = [name_of(index, STEM) for index in range(len(dataset))]
    layout.put("vae-sd/dataset.json", labels_json(dataset, names))
    layout.put("images/dataset.json", labels_json(dataset, map(_png, names)))


def _png(name: str) -> str:
    return name.removesuffix(".npy") + ".png"

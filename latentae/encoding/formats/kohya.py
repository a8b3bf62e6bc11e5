"""kohya's sd-scripts: the cache of latents beside each image, for SD and SDXL.

    NAME_WWWWxHHHH_sd.npz     latents [z, h, w] fp32 (drawn, raw), original_size (w, h), crop_ltrb; latents_flipped where stored;
                              WWWWxHHHH is the size of the original image, the ending _sd or _sdxl
    NAME.jpg, NAME.txt ...    the image where it was kept, and its caption

NAME is the image's own, with spaces and dots: `latentae shards` escapes them in keys. Without kept images, the files belong into the
folder of the images. The reader expects one latent for eight pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from latentae.data.folder import check_file_names, unescape_key
from latentae.encoding.formats.layout import Layout, draw, npz
from latentae.encoding.latents import LatentDataset
from latentae.encoding.places import JSON_MEMBER
from latentae.errors import OutputError, RecipeError

__all__ = ["OPTIONS", "build", "check", "check_names", "crop_ltrb", "target"]

OPTIONS: dict[str, Any] = {"seed": 0, "model": "sd"}
MODELS = ("sd", "sdxl")
FACTOR = 8
CAPTIONS = ("txt", "caption")


def check(dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Whether the latents can be written so."""
    if options["model"] not in MODELS:
        raise RecipeError(f"model is {options['model']!r}, expected one of {', '.join(MODELS)}")
    if not len(dataset):
        raise OutputError("there is no latent to write; encode images first")
    height, width = dataset.sizes[0] // FACTOR
    found = tuple(dataset.posterior(0).mean.shape[1:])
    if found != (height, width):
        raise OutputError(
            f"kohya reads latents of {FACTOR} pixels, found {found[0]}x{found[1]} for an image of {dataset.sizes[0][0]}x"
            f"{dataset.sizes[0][1]}; use a model that downsamples by {FACTOR}"
        )


def check_names(out: str | Path, samples: Iterable[tuple[str, str]], model: str = "sd") -> None:
    """Refuse keys of samples whose files can't all be written.

    Args:
        out: the folder of the layout.
        samples: the key and the shard of each.
        model: the ending of the file names.

    Raises:
        OutputError: as `check_file_names`.
    """
    longest = f"_00000x00000_{model}.npz"
    check_file_names(
        out, ((f"{unescape_key(key)}{longest}", f"sample {key!r} of {shard}") for key, shard in samples)
    )


def target(options: dict[str, Any]) -> str:
    """What the trainer is given."""
    return "."


def build(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write everything."""
    sizes = dataset.sizes
    for rows in layout.shards():
        for index in rows:
            members, info = dataset.members(index), dataset.meta(index)[JSON_MEMBER]
            high, wide = info["original_size"]
            bucket = (int(sizes[index][1]), int(sizes[index][0]))
            arrays = {
                "latents": draw(dataset, index, options["seed"]).numpy(),
                "original_size": np.array([wide, high]),
                "crop_ltrb": np.array(crop_ltrb(bucket, (wide, high))),
            }
            if dataset.flips:
                arrays["latents_flipped"] = draw(dataset, index, options["seed"], flip=True).numpy()
            name = unescape_key(dataset.keys[index])
            layout.put(f"{name}_{wide:04}x{high:04}_{options['model']}.npz", npz(arrays))
            for extension in (info["source"], *CAPTIONS):
                if extension in members:
                    layout.put(f"{name}.{extension}", members[extension])


def crop_ltrb(bucket: tuple[int, int], image: tuple[int, int]) -> tuple[float, float, float, float]:
    """What the trainer tells SDXL of the crop: the image fitted into the bucket, both (width, height) -> left, top, right, bottom.

    Not where the image was cut: it is how Stability AI's preprocessing put it, of which the trainer reads left and top.
    """
    ratio = image[0] / image[1]
    wide, high = (
        (bucket[1] * ratio, bucket[1]) if bucket[0] / bucket[1] > ratio else (bucket[0], bucket[0] / ratio)
    )
    left, top = (bucket[0] - wide) // 2, (bucket[1] - high) // 2
    return left, top, left + wide, top + high

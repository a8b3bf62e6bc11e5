"""kohya's sd-scripts: the latent cache next to each image, for SD and SDXL.

    NAME_WWWWxHHHH_sd.npz     latents [z, h, w] fp32 (drawn, raw), original_size (w, h), crop_ltrb;
                              latents_flipped if stored. WWWWxHHHH is the original image size,
                              the suffix is _sd or _sdxl
    NAME.jpg, NAME.txt ...    the image if stored, and its caption

NAME is the image's file name; `latentae shards` escapes spaces and dots in keys. Without stored
images, copy the files into the folder of the images. The reader expects latents downsampled by 8.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from latentae.data.folder import check_file_names, unescape_key
from latentae.encoding.formats.layout import Layout, draw, npz
from latentae.encoding.latent_dataset import LatentDataset
from latentae.encoding.latent_shard import JSON_MEMBER
from latentae.errors import OutputError, RecipeError

__all__ = ["FACTOR", "build", "check", "check_names", "crop_ltrb"]

FACTOR = 8


def check(dataset: LatentDataset, out: Path, options: dict[str, Any]) -> None:
    """Check options, latent size and file names; RecipeError or OutputError if they do not fit."""
    if options["model"] not in ("sd", "sdxl"):
        raise RecipeError(f"model is {options['model']!r}, expected one of sd, sdxl")
    if not len(dataset):
        raise OutputError("there are no latents to write; encode images first")
    height, width = map(int, dataset.sizes[0])
    found = tuple(dataset.posterior(0).mean.shape[1:])
    if found != (height // FACTOR, width // FACTOR):
        raise OutputError(
            f"kohya reads latents downsampled by {FACTOR}, found {found[0]}x{found[1]} for an image of "
            f"{height}x{width}; use a model that downsamples by {FACTOR}"
        )
    shards = zip(dataset.shards, dataset.shard_ranges, strict=True)
    names = ((dataset.keys[index], shard) for shard, rows in shards for index in rows)
    check_names(out, names, options["model"])


def check_names(out: str | Path, samples: Iterable[tuple[str, str]], model: str = "sd") -> None:
    """Check that the files of all samples can be written.

    Args:
        out: folder of the layout.
        samples: key and shard of each sample.
        model: suffix of the file names.

    Raises:
        OutputError: see `check_file_names`.
    """
    longest = f"_00000x00000_{model}.npz"
    check_file_names(
        out, ((f"{unescape_key(key)}{longest}", f"sample {key!r} of {shard}") for key, shard in samples)
    )


def build(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write all files."""
    for index in layout.samples():
        members, info = dataset.members(index), dataset.meta(index)[JSON_MEMBER]
        high, wide = info["original_size"]
        height, width = map(int, dataset.sizes[index])
        arrays = {
            "latents": draw(dataset, index, options["seed"]).numpy(),
            "original_size": np.array([wide, high]),
            "crop_ltrb": np.array(crop_ltrb((width, height), (wide, high))),
        }
        if dataset.flips:
            arrays["latents_flipped"] = draw(dataset, index, options["seed"], flip=True).numpy()
        name = unescape_key(dataset.keys[index])
        layout.put(f"{name}_{wide:04}x{high:04}_{options['model']}.npz", npz(arrays))
        for extension in (info["source"], "txt", "caption"):
            if extension in members:
                layout.put(f"{name}.{extension}", members[extension])


def crop_ltrb(bucket: tuple[int, int], image: tuple[int, int]) -> tuple[float, float, float, float]:
    """SDXL's crop conditioning: an image fitted into its bucket.

    It is not the actual crop but the convention of Stability AI's preprocessing. The trainer uses
    left and top.

    Args:
        bucket, image: (width, height) in pixels.

    Returns:
        Left, top, right, bottom.
    """
    ratio = image[0] / image[1]
    wide, high = (
        (bucket[1] * ratio, bucket[1]) if bucket[0] / bucket[1] > ratio else (bucket[0], bucket[0] / ratio)
    )
    left, top = (bucket[0] - wide) // 2, (bucket[1] - high) // 2
    return left, top, left + wide, top + high

"""Layouts of five trainers of class-conditional diffusion models; every sample has a label.

LightningDiT: safetensors of up to 10,000 samples, drawn and raw, and statistics of all data.

    latents_rankRR_shardSSS.safetensors   latents, latents_flip [n, z, h, w] fp32; labels [n] int64
    latents_stats.pt                      mean, std [1, z, 1, 1] fp32, for normalization

    The reader picks latents or latents_flip at random and reads files in the order of their names.

EDM2: mean and standard deviation (not log-variance) of each latent as npy, in a zip or a folder.

    00000/img-mean-std-00000000.npy   [2z, h, w] fp32: mean, then std
    dataset.json                      {"labels": [[path, label], ...]}

    EDM2's own autoencoder takes images in [0, 1], ours [-1, 1]: decode samples with the same model.

REPA: images, and mean and standard deviation (not log-variance), paired by the order of names.

    images/00000/img00000000.png   the encoded crop, for the features that REPA aligns to
    vae-sd/00000/img00000000.npy   [2z, h, w] fp32: mean, then std
    .../dataset.json               {"labels": [[path, label], ...]} in both folders

MAR: mean and log-variance (not standard deviation) of images and flips, one folder per class.

    00007/00000000.npz   moments, moments_flip [2z, h, w] fp32: mean, then logvar

    The reader numbers classes by the order of their folders, so folders are labels with leading
    zeros.

fast-DiT: one file per sample, drawn and scaled, and one file per label.

    imagenet256_features/i.npy   [1, z, h, w] fp32: z * scaling
    imagenet256_labels/i.npy     [1] int64

    The trainer fixes the folder names for all data sets. Latents are not shifted: decode z /
    scaling.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from latentae.data.decode import decode_image
from latentae.data.shrinking import encode_png
from latentae.data.transforms import crop_to_bucket
from latentae.encoding.formats.layout import Layout, draw, npy, npz
from latentae.encoding.latent_dataset import LatentDataset
from latentae.encoding.latent_shard import JSON_MEMBER
from latentae.errors import DataError, OutputError

__all__ = [
    "EDM2_ZIP",
    "build_edm2",
    "build_fastdit",
    "build_lightningdit",
    "build_mar",
    "build_repa",
    "check_fastdit",
    "check_mar",
]

EDM2_ZIP = "latents.zip"
FILE_SAMPLES = 10_000  # of LightningDiT


def build_lightningdit(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write LightningDiT's files. A shard of over FILE_SAMPLES samples becomes several files."""
    ranges = dataset.shard_ranges
    files = accumulate(map(_file_count, ranges), initial=0)
    first = dict(zip(ranges, files, strict=False))  # number of a shard's first file
    for rows in layout.shards():
        for part in range(_file_count(rows)):
            chosen = rows[part * FILE_SAMPLES : (part + 1) * FILE_SAMPLES]
            rank, shard = divmod(first[rows] + part, 1000)  # three digits keep the names in order
            tensors = {
                name: torch.stack([draw(dataset, index, options["seed"], flip=flip) for index in chosen])
                for name, flip in (("latents", False), ("latents_flip", True))
            }
            tensors["labels"] = torch.from_numpy(dataset.labels[chosen.start : chosen.stop].copy())
            layout.put(f"latents_rank{rank:02}_shard{shard:03}.safetensors", save(tensors))
    statistics = {
        name: torch.tensor(dataset.statistics[f"latents_{name}"], dtype=torch.float32).reshape(1, -1, 1, 1)
        for name in ("mean", "std")
    }
    file = io.BytesIO()  # torch.save writes a file's name into it
    torch.save(statistics, file)
    layout.put("latents_stats.pt", file.getvalue())


def _file_count(rows: range) -> int:
    return -(-len(rows) // FILE_SAMPLES)


def build_edm2(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write EDM2's files. An interrupted zip starts again."""
    if options["folder"]:
        for index in layout.samples():
            layout.put(_name(index), npy(_mean_std(dataset, index)))
        layout.put("dataset.json", _labels_json(dataset))
        return
    files = ((_name(index), npy(_mean_std(dataset, index))) for index in layout.samples(resume=False))
    layout.put_zip(EDM2_ZIP, chain(files, [("dataset.json", _labels_json(dataset))]))


def _name(index: int, stem: str = "img-mean-std-") -> str:
    """The file name of a sample."""
    return f"{index // 1000:05}/{stem}{index:08}.npy"


def _mean_std(dataset: LatentDataset, index: int) -> np.ndarray:
    """Mean and standard deviation of a latent, [2z, h, w] fp32."""
    latent = dataset.posterior(index)
    return np.concatenate([latent.mean.numpy(), (0.5 * latent.logvar).exp().numpy()])


def _labels_json(dataset: LatentDataset, names: Iterable[str] | None = None) -> bytes:
    """`dataset.json`: path and label of every sample."""
    names = names or map(_name, range(len(dataset)))
    labels = [[name, int(label)] for name, label in zip(names, dataset.labels, strict=True)]
    return json.dumps({"labels": labels}).encode()


def build_repa(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write REPA's files."""
    height, width = map(int, dataset.sizes[0])
    for index in layout.samples():
        extension, name = dataset.meta(index)[JSON_MEMBER]["source"], _name(index, "img")
        member = f"{dataset.keys[index]}.{extension}"
        data = dataset.members(index)[extension]
        image = decode_image(data, member, max_pixels=None, short=max(height, width))
        layout.put(f"images/{_png(name)}", encode_png(crop_to_bucket(image, (height, width))))
        layout.put(f"vae-sd/{name}", npy(_mean_std(dataset, index)))
    names = [_name(index, "img") for index in range(len(dataset))]
    layout.put("vae-sd/dataset.json", _labels_json(dataset, names))
    layout.put("images/dataset.json", _labels_json(dataset, map(_png, names)))


def _png(name: str) -> str:
    return name.removesuffix(".npy") + ".png"


def check_mar(dataset: LatentDataset, out: Path, options: dict[str, Any]) -> None:
    """Check that classes are numbered without gaps; DataError if not."""
    classes = np.unique(dataset.labels)
    gap = next((number for number, label in enumerate(classes) if number != label), None)
    if gap is not None:
        raise DataError(
            f"mar numbers classes by the order of their folders, but class {gap} has no sample "
            f"({len(classes)} classes up to {classes[-1]}), which would shift the labels; "
            "number classes from 0 without gaps"
        )


def build_mar(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write MAR's files."""
    for index in layout.samples():
        arrays = {}
        for name, flip in (("moments", False), ("moments_flip", True)):
            latent = dataset.posterior(index, flip=flip)
            arrays[name] = np.concatenate([latent.mean.numpy(), latent.logvar.numpy()])
        layout.put(f"{dataset.labels[index]:05}/{index:08}.npz", npz(arrays))


def check_fastdit(dataset: LatentDataset, out: Path, options: dict[str, Any]) -> None:
    """Set the default scaling; OutputError if there is none."""
    if options["scaling"] is None:
        options["scaling"] = dataset.statistics["scaling_factor"]
    if options["scaling"] is None:
        raise OutputError("the latents are constant, so they have no scaling factor; give one")


def build_fastdit(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write fast-DiT's files."""
    for index in layout.samples():
        latent = draw(dataset, index, options["seed"]) * options["scaling"]
        layout.put(f"imagenet256_features/{index}.npy", npy(latent[None].numpy()))
        layout.put(f"imagenet256_labels/{index}.npy", npy(np.array([dataset.labels[index]], np.int64)))

"""LightningDiT: safetensors of up to 10 000 samples, drawn and raw, and statistics over all the data.

    latents_rankRR_shardSSS.safetensors   latents, latents_flip [n, z, h, w] fp32; labels [n] int64
    latents_stats.pt                      mean, std [1, z, 1, 1] fp32: the trainer normalises by them

The reader takes latents or latents_flip by a coin, and its files in the order of their names.
"""

from __future__ import annotations

import io
from itertools import accumulate
from typing import Any

import torch
from safetensors.torch import save

from latentae.encoding.formats.layout import Layout, draw, require_flips, require_labels, require_one_size
from latentae.encoding.latents import LatentDataset

__all__ = ["OPTIONS", "build", "check", "target"]

OPTIONS: dict[str, Any] = {"seed": 0}
FILE_SAMPLES = 10_000


def check(dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Whether the latents can be written so."""
    require_one_size(dataset, "lightningdit")
    require_flips(dataset, "lightningdit")
    require_labels(dataset, "lightningdit")


def target(options: dict[str, Any]) -> str:
    """What the trainer is given."""
    return "."


def build(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write everything. A shard of more samples than a file holds becomes several files."""
    ranges = dataset.shard_ranges
    number = dict(
        zip((rows.start for rows in ranges), accumulate(map(_files, ranges), initial=0), strict=False)
    )
    for rows in layout.shards():
        for part in range(_files(rows)):
            chosen = rows[part * FILE_SAMPLES : (part + 1) * FILE_SAMPLES]
            rank, shard = divmod(number[rows.start] + part, 1000)  # three digits keep names in order
            tensors = {
                "latents": torch.stack([draw(dataset, index, options["seed"]) for index in chosen]),
                "latents_flip": torch.stack(
                    [draw(dataset, index, options["seed"], flip=True) for index in chosen]
                ),
                "labels": torch.from_numpy(dataset.labels[chosen.start : chosen.stop].copy()),
            }
            layout.put(f"latents_rank{rank:02}_shard{shard:03}.safetensors", save(tensors))
    statistics = {name: _channels(dataset.statistics[f"latents_{name}"]) for name in ("mean", "std")}
    file = io.BytesIO()  # torch.save writes the name of a file into it
    torch.save(statistics, file)
    layout.put("latents_stats.pt", file.getvalue())


def _files(rows: range) -> int:
    return -(-len(rows) // FILE_SAMPLES)


def _channels(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)

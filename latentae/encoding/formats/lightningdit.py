"""LightningDiT: safetensors of up to 10,000 samples, drawn and raw, and statistics of all data.

    latents_rankRR_shardSSS.safetensors   latents, latents_flip [n, z, h, w] fp32; labels [n] int64
    latents_stats.pt                      mean, std [1, z, 1, 1] fp32, for normalization

The reader picks latents or latents_flip at random and reads files in the order of their names.
"""

from __future__ import annotations

import io
from itertools import accumulate
from typing import Any

import torch
from safetensors.torch import save

from latentae.encoding.formats.layout import Layout, draw
from latentae.encoding.latent_dataset import LatentDataset

__all__ = ["OPTIONS", "build"]

OPTIONS: dict[str, Any] = {"seed": 0}
FILE_SAMPLES = 10_000


def build(layout: Layout, dataset: LatentDataset, options: dict[str, Any]) -> None:
    """Write all files. A shard of more than FILE_SAMPLES samples becomes several files."""
    ranges = dataset.shard_ranges
    first = dict(zip(ranges, accumulate(map(_files, ranges), initial=0), strict=False))  # file of a shard
    for rows in layout.shards():
        for part in range(_files(rows)):
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


def _files(rows: range) -> int:
    return -(-len(rows) // FILE_SAMPLES)

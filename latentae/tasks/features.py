"""The task `features`: images to vectors or latents in files that NumPy and safetensors read, with a linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentae.errors import ImageError, RecipeError
from latentae.files import atomic_file, read_json, write_json
from latentae.jobs import Job
from latentae.measures.latents.probe import probe_report
from latentae.options import verb
from latentae.progress import Progress, say
from latentae.tasks.inputs import Images, Labels, open_images, read_labels
from latentae.tasks.network import Network, batches
from latentae.tasks.options import FeaturesOptions
from latentae.tasks.parts import Parts

__all__ = ["FORMATS", "POOLS", "features", "pool_latents"]

POOLS, FORMATS = ("mean", "moments", "spatial"), ("safetensors", "npz")
INDEX, SUMMARY = "index.csv", "summary.json"
PART = {"mean": 16384, "moments": 16384, "spatial": 1024}  # images of a file
PROBE_NUMBERS = 1 << 25  # features times images that a probe is fitted on at most: 256 MB


@verb(FeaturesOptions)
def features(options: FeaturesOptions) -> dict[str, Any]:
    """Write the features of images, and where images have labels, how well a linear classifier tells them apart by these.

    OUT gets features-00000.safetensors, ... (or .npz) with the tensor `features`, fp32 [n, d] or [n, z, h, w]; index.csv, which names
    file and row of each key and its label; and summary.json, with the report of the probe. Latents are raw posterior means.

    Returns:
        What summary.json holds.

    Raises:
        LatentAEError: the model, the inputs, an option or the output folder can't be used.
        ImageError: with "spatial", images of different sizes.
    """
    if options.pool not in POOLS or options.format not in FORMATS:
        raise RecipeError(
            f"pool is {options.pool!r} and format {options.format!r}; expected one of {', '.join(POOLS)}, and of {', '.join(FORMATS)}"
        )
    network = Network(options.model, options.weights, options.device)
    network.check(options.resolution, options.batch_size)
    images, (label_of, label_kind) = (
        open_images(options.inputs, max_pixels=options.max_pixels),
        read_labels(options.labels),
    )
    facts = {
        "model": network.fingerprint,
        "inputs": images.digest,
        "pool": options.pool,
        "format": options.format,
        "labels": label_kind,
    }
    job = Job.open(options.out, "features", {**facts, "resolution": options.resolution})
    if job.state == "finished":
        say(f"{options.out} already holds these features; see {job.folder / SUMMARY}")
        return read_json(job.folder / SUMMARY)
    work = _Extraction(
        network,
        images,
        label_of,
        job.folder,
        options.pool,
        options.format,
        options.resolution,
        options.batch_size,
    )
    parts = Parts(job.folder, images.count, PART[options.pool])
    with Progress("features", images.count) as progress:
        for part, numbers in parts.todo(progress):
            parts.done(part, work.make(part, numbers, progress))
    parts.write_table(job.folder / INDEX, ["key", "label", "file", "row"])
    result = {"images": images.count, "pool": options.pool, **work.probe(parts)}
    write_json(job.folder / SUMMARY, result)
    job.finish(images=images.count)
    parts.clear()
    say(f"features: {images.count} images in {options.out}, {_told(result['probe'])}")
    return result


def pool_latents(latents: Tensor, pool: str) -> Tensor:
    """[B, z, h, w] -> [B, z] ("mean"), [B, 2z] ("moments": means, then standard deviations over places) or itself ("spatial")."""
    if pool == "spatial":
        return latents
    mean = latents.mean(dim=(2, 3))
    return mean if pool == "mean" else torch.cat([mean, latents.std(dim=(2, 3), correction=0)], dim=1)


@dataclass(frozen=True)
class _Extraction:
    network: Network
    images: Images
    labels: Labels
    folder: Path
    pool: str
    format: str
    resolution: int | None
    batch_size: int

    def make(self, part: int, numbers: Sequence[int], progress: Progress) -> list[dict[str, Any]]:
        """Write one file of features; give the rows of its images in the index."""
        file, rows, pooled = self.folder / f"features-{part:05}.{self.format}", [], []
        items = self.images.items(
            numbers, self.labels, channels=self.network.channels, resolution=self.resolution
        )
        for batch in batches(items, self.batch_size):
            latents = pool_latents(self.network.encode(batch).mode(), self.pool).float().cpu()
            if pooled and latents.shape[1:] != pooled[0].shape[1:]:
                found = " and ".join(
                    " x ".join(map(str, tensor.shape[1:])) for tensor in (pooled[0], latents)
                )
                raise ImageError(
                    f"found latents of {found}, expected one size (image {batch.items[0].key}); give a resolution"
                )
            pooled.append(latents)
            for item in batch.items:
                rows.append({"key": item.key, "label": item.label, "file": file.name, "row": len(rows)})
            progress.advance(len(batch.items))
        tensor = torch.cat(pooled).contiguous()
        with atomic_file(file) as temporary:
            if self.format == "npz":
                with temporary.open("wb") as target:
                    np.savez(target, features=tensor.numpy(), keys=np.array([row["key"] for row in rows]))
            else:
                save_file({"features": tensor}, temporary)
        return rows

    def probe(self, parts: Parts) -> dict[str, Any]:
        """Shape of a feature, and what a linear probe makes of the labelled images; of many, evenly spread ones."""
        labelled = sum(row["label"] is not None for row in parts.rows())
        shape: list[int] = []
        keys: list[str] = []
        labels: list[str] = []
        chosen: list[Tensor] = []
        file, tensor, seen = "", torch.empty(0), 0
        for row in parts.rows():
            if row["file"] != file:
                file = row["file"]
                tensor = self._load(file)
                if shape and shape != list(tensor.shape[1:]):
                    raise ImageError(
                        f"{file} has features of another size than the files before it; give a resolution"
                    )
                shape = list(tensor.shape[1:])
            if row["label"] is not None:
                stride = -(-labelled * tensor[0].numel() // PROBE_NUMBERS)
                if seen % stride == 0:
                    keys.append(row["key"])
                    labels.append(row["label"])
                    chosen.append(tensor[row["row"]].flatten().clone())
                seen += 1
        if not chosen:
            return {"shape": shape, "probe": None}
        return {
            "shape": shape,
            "probe": {"labelled": labelled, **probe_report(keys, labels, torch.stack(chosen))},
        }

    def _load(self, file: str) -> Tensor:
        if self.format == "npz":
            with np.load(self.folder / file) as arrays:
                return torch.from_numpy(arrays["features"])
        return load_file(self.folder / file)["features"]


def _told(probe: dict[str, Any] | None) -> str:
    if probe is None:
        return "no labels, so no probe"
    if "skipped" in probe:
        return probe["skipped"]
    return (
        f"linear probe {100 * probe['accuracy']:.1f} % of {probe['tested_on']} held-out images right "
        f"(the most frequent class alone {100 * probe['most_frequent_class']:.1f} %)"
    )

"""The verb `features`: write latents as feature files, and fit a linear probe."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentae.errors import ImageError
from latentae.files import atomic_file
from latentae.measures.latents.probe import probe_report
from latentae.options import identity, verb
from latentae.progress import Progress, say
from latentae.tasks.inputs import Images, Labels, open_images, read_labels
from latentae.tasks.network import Network
from latentae.tasks.options import FeaturesOptions
from latentae.tasks.outputs import PartedJob

__all__ = ["features"]

INDEX = "index.csv"
PART = {"mean": 16384, "moments": 16384, "spatial": 1024}  # images per file
PROBE_NUMBERS = 1 << 25  # maximum number of features times images of the probe's fit: 256 MB


@verb(FeaturesOptions)
def features(options: FeaturesOptions) -> dict[str, Any]:
    """Write the features of images and, with labels, the accuracy of a linear probe on them.

    OUT gets features-00000.safetensors, ... (or .npz) with the tensor `features`, fp32 [n, d] or
    [n, z, h, w]; index.csv with file, row and label of each key; and summary.json with the report
    of the probe. Latents are raw posterior means.

    Returns:
        The content of summary.json.

    Raises:
        LatentAEError: the model, the inputs, an option or the output folder can't be used.
        ImageError: with pool "spatial", images of different sizes.
    """
    network = Network(options, options.batch_size)
    images = open_images(options.inputs, max_pixels=options.max_pixels)
    labels, label_kind = read_labels(options.labels)
    facts = {
        "model": network.fingerprint,
        "inputs": images.digest,
        **identity(options),
        "labels": label_kind,
    }
    job = PartedJob(options.out, "features", facts, images.count, PART[options.pool])
    if (earlier := job.earlier_result()) is not None:
        return earlier
    work = _Extraction(options, network, images, labels, job)
    job.run(work.write_part)
    job.write_table(INDEX, ["key", "label", "file", "row"])
    result = {"images": images.count, "pool": options.pool, **work.probe()}
    job.finish(result)
    say(f"features: {images.count} images in {options.out}, {_in_words(result['probe'])}")
    return result


@dataclass(frozen=True)
class _Extraction:
    options: FeaturesOptions
    network: Network
    images: Images
    labels: Labels
    job: PartedJob

    def write_part(self, part: int, numbers: Sequence[int], progress: Progress) -> list[dict[str, Any]]:
        """Write one file of features; return the index rows of its images."""
        file = self.job.folder / f"features-{part:05}.{self.options.format}"
        rows, pooled = [], []
        for batch in self.network.batches(self.images, numbers, self.labels):
            found = _pool(self.network.encode(batch).mode(), self.options.pool).float().cpu()
            if pooled and found.shape[1:] != pooled[0].shape[1:]:
                sizes = " and ".join(" x ".join(map(str, item.shape[1:])) for item in (pooled[0], found))
                raise ImageError(
                    f"found latents of {sizes}, expected one size (image {batch.items[0].key}); "
                    "give a resolution"
                )
            pooled.append(found)
            for item in batch.items:
                rows.append({"key": item.key, "label": item.label, "file": file.name, "row": len(rows)})
            progress.advance(len(batch.items))
        tensor = torch.cat(pooled).contiguous()
        with atomic_file(file) as temporary:
            if self.options.format == "npz":
                with temporary.open("wb") as target:
                    np.savez(target, features=tensor.numpy(), keys=np.array([row["key"] for row in rows]))
            else:
                save_file({"features": tensor}, temporary)
        return rows

    def probe(self) -> dict[str, Any]:
        """Shape of a feature, and the report of a linear probe on evenly spread labeled images."""
        labeled = sum(row["label"] is not None for row in self.job.rows())
        shape: list[int] = []
        chosen: list[tuple[str, str, Tensor]] = []
        seen = 0
        for file, rows in itertools.groupby(self.job.rows(), key=lambda row: row["file"]):
            tensor = self._load(file)
            if shape and shape != list(tensor.shape[1:]):
                raise ImageError(f"{file} has features of another size than earlier files; give a resolution")
            shape = list(tensor.shape[1:])
            stride = -(-labeled * tensor[0].numel() // PROBE_NUMBERS)
            for row in rows:
                if row["label"] is not None:
                    if seen % stride == 0:
                        chosen.append((row["key"], row["label"], tensor[row["row"]].flatten().clone()))
                    seen += 1
        if not chosen:
            return {"shape": shape, "probe": None}
        keys, labels, found = zip(*chosen, strict=True)
        return {
            "shape": shape,
            "probe": {"labelled": labeled, **probe_report(keys, labels, torch.stack(found))},
        }

    def _load(self, file: str) -> Tensor:
        if self.options.format == "npz":
            with np.load(self.job.folder / file) as arrays:
                return torch.from_numpy(arrays["features"])
        return load_file(self.job.folder / file)["features"]


def _pool(latents: Tensor, pool: str) -> Tensor:
    """[B, z, h, w] -> "mean" [B, z], "moments" [B, 2z] (mean, then std), or itself."""
    if pool == "spatial":
        return latents
    mean = latents.mean(dim=(2, 3))
    return mean if pool == "mean" else torch.cat([mean, latents.std(dim=(2, 3), correction=0)], dim=1)


def _in_words(probe: dict[str, Any] | None) -> str:
    if probe is None:
        return "no labels, so no probe"
    if "skipped" in probe:
        return probe["skipped"]
    return (
        f"linear probe {100 * probe['accuracy']:.1f} % of {probe['tested_on']} held-out images correct "
        f"(most frequent class: {100 * probe['most_frequent_class']:.1f} %)"
    )

"""The verb `denoise`: write reconstructions of noisy images, and measure the gain in PSNR."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae import keyed
from latentae.data.folder import check_file_names
from latentae.data.transforms import to_float, to_uint8
from latentae.measures.metrics import bootstrap_mean, psnr
from latentae.models.corruptions import add_noise
from latentae.options import identity, verb
from latentae.pages.images import write_png
from latentae.progress import Progress, say
from latentae.tasks.inputs import Images, Item, open_images
from latentae.tasks.network import Batch, Network
from latentae.tasks.options import DenoiseOptions
from latentae.tasks.outputs import PartedJob, thumbnails

__all__ = ["denoise"]

IMAGES, NOISY, EXAMPLES, TABLE = "images", "noisy", "examples.png", "psnr.csv"
PART, WRITERS = 256, 8
SHOWN = 8  # examples


@verb(DenoiseOptions)
def denoise(options: DenoiseOptions) -> dict[str, Any]:
    """Write reconstructions of noisy images, or of clean images with added Gaussian noise.

    OUT gets images/KEY.png (8 bits), examples.png and summary.json. With `noise` it also gets
    noisy/KEY.png and psnr.csv, the PSNR of each image before and after. The model sees the images
    of noisy/: noise rounded to 8 bits and clipped, as in a file.

    Returns:
        The content of summary.json.

    Raises:
        LatentAEError: the model, the images, an option or the output folder can't be used.
    """
    network = Network(options, options.batch_size, reconstructs=True)
    images = open_images(options.inputs, max_pixels=options.max_pixels)
    names = ((f"{key}.png", f"image {name}") for key, name in images.names())
    check_file_names(Path(options.out) / IMAGES, names)
    facts = {
        "model": network.fingerprint,
        "inputs": images.digest,
        **identity(options),
    }
    job = PartedJob(options.out, "denoise", facts, images.count, PART)
    if (earlier := job.earlier_result()) is not None:
        return earlier
    work = _Denoising(options, network, images, job.folder)
    job.run(work.write_part)
    work.draw_examples()
    result: dict[str, Any] = {"images": images.count, "noise": options.noise, "seed": options.seed}
    gain = ""
    if options.noise:
        job.write_table(TABLE, ["key", "before", "after"])
        result |= _gain(job)
        gain = f", PSNR {_decibels(result['before'])} before and {_decibels(result['after'])} after"
    job.finish(result)
    say(f"denoise: {images.count} images in {job.folder / IMAGES}{gain}")
    return result


@dataclass(frozen=True)
class _Denoising:
    options: DenoiseOptions
    network: Network
    images: Images
    folder: Path

    def write_part(self, _: int, numbers: Sequence[int], progress: Progress) -> list[dict[str, Any]]:
        """Write the pictures of some images; return their rows of the table."""
        rows: list[dict[str, Any]] = []
        for clean, given in self._batches(numbers):
            results = to_uint8(self.network.reconstruct(given)[1]).cpu()
            before, after = psnr(given.images, clean).tolist(), psnr(results, clean).tolist()
            self._write(IMAGES, given, results)
            if self.options.noise:
                self._write(NOISY, given, given.images)
            for item, *values in zip(given.items, before, after, strict=True):
                # JSON has no infinity, which is the PSNR of equal images
                before_after = [value if math.isfinite(value) else None for value in values]
                rows.append({"key": item.key, **dict(zip(("before", "after"), before_after, strict=True))})
            progress.advance(len(given.items))
        return rows

    def _write(self, name: str, batch: Batch, images: Tensor) -> None:
        files = [self.folder / name / f"{item.key}.png" for item in batch.items]
        with ThreadPoolExecutor(WRITERS) as pool:  # each thread waits for the disk
            list(pool.map(write_png, files, images))

    def draw_examples(self) -> None:
        """The first images: clean, noisy if noise was added, and reconstructed."""
        rows: list[list[Tensor]] = [[], [], []]
        for clean, given in self._batches(range(min(SHOWN, self.images.count))):
            results = to_uint8(self.network.reconstruct(given)[1]).cpu()
            for row, pictures in zip(rows, (clean, given.images, results), strict=True):
                row += pictures
        write_png(self.folder / EXAMPLES, thumbnails(rows if self.options.noise else rows[1:]))

    def _batches(self, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Batch]]:
        """Clean images, uint8, and the batch that the model is given."""
        for batch in self.network.batches(self.images, numbers):
            clean = to_uint8(to_float(batch.images))
            if self.options.noise:
                draws = torch.stack([_normal(self.options.seed, item) for item in batch.items])
                scale = torch.full((len(draws),), self.options.noise)
                batch = Batch(batch.items, to_uint8(add_noise(to_float(batch.images), draws, scale)))
            yield clean, batch


def _normal(seed: int, item: Item) -> Tensor:
    """Standard normal noise of an image, the same on every device and in every batch."""
    return torch.randn(item.image.shape, generator=keyed.generator("denoise", seed, item.key))


def _gain(job: PartedJob) -> dict[str, Any]:
    """Mean PSNR before and after, with its 95 % interval."""
    found = {}
    for name in ("before", "after"):
        interval = bootstrap_mean([math.inf if row[name] is None else row[name] for row in job.rows()])
        found[name] = {key: getattr(interval, key) for key in ("mean", "low", "high")}
        found[name]["images"] = interval.n
    return found


def _decibels(interval: dict[str, Any]) -> str:
    return "infinite" if interval["mean"] is None else f"{interval['mean']:.2f} dB"

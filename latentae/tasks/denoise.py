"""The task `denoise`: images through the model and back, to files; with noise added on purpose, how much it helps."""

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
from latentae.data.file_names import check_file_names
from latentae.data.transforms import to_float, to_uint8
from latentae.errors import RecipeError
from latentae.files import read_json, write_json
from latentae.jobs import Job
from latentae.measures.metrics import bootstrap_mean, psnr
from latentae.models.corruptions import add_noise
from latentae.options import verb
from latentae.pages.images import image_grid, write_png
from latentae.progress import Progress, say
from latentae.tasks.inputs import Images, Item, open_images, read_labels
from latentae.tasks.network import Batch, Network, batches
from latentae.tasks.options import DenoiseOptions
from latentae.tasks.parts import Parts
from latentae.tasks.pictures import enlarge, rgb

__all__ = ["denoise"]

IMAGES, NOISY, EXAMPLES, TABLE, SUMMARY = "images", "noisy", "examples.png", "psnr.csv", "summary.json"
PART, WRITERS = 256, 8
_SHOWN = 8  # examples


@verb(DenoiseOptions)
def denoise(options: DenoiseOptions) -> dict[str, Any]:
    """Write what the model makes of noisy images, or of clean ones to which Gaussian noise is added to see what it is worth.

    OUT gets images/KEY.png (8 bits), examples.png and summary.json; with noise also noisy/KEY.png and psnr.csv, with the PSNR of each image
    before and after. The model sees what noisy/ holds: noise rounded to 8 bits and cut off at black and white, as a file has it.

    Returns:
        What summary.json holds.

    Raises:
        LatentAEError: the model, the images, an option or the output folder can't be used.
    """
    if not 0 <= options.noise < math.inf:
        raise RecipeError(
            f"noise is {options.noise:g}, expected a standard deviation of 0 or more on the scale of [-1, 1]"
        )
    network = Network(options.model, options.weights, options.device, reconstructs=True)
    network.check(options.resolution, options.batch_size)
    images = open_images(options.inputs, max_pixels=options.max_pixels)
    check_file_names(
        Path(options.out) / IMAGES, ((f"{key}.png", f"image {name}") for key, name in images.names())
    )
    facts = {
        "model": network.fingerprint,
        "inputs": images.digest,
        "noise": options.noise,
        "seed": options.seed,
        "resolution": options.resolution,
    }
    job = Job.open(options.out, "denoise", facts)
    if job.state == "finished":
        say(f"{options.out} already holds these images; see {job.folder / EXAMPLES}")
        return read_json(job.folder / SUMMARY)
    work = _Denoising(
        network, images, job.folder, options.noise, options.seed, options.resolution, options.batch_size
    )
    parts = Parts(job.folder, images.count, PART)
    with Progress("denoise", images.count) as progress:
        for part, numbers in parts.todo(progress):
            parts.done(part, work.make(numbers, progress))
    work.draw_examples()
    result: dict[str, Any] = {"images": images.count, "noise": options.noise, "seed": options.seed}
    if options.noise:
        parts.write_table(job.folder / TABLE, ["key", "before", "after"])
        result |= _gain(parts)
    write_json(job.folder / SUMMARY, result)
    job.finish(images=images.count)
    parts.clear()
    gain = (
        f", PSNR {_decibels(result['before'])} before and {_decibels(result['after'])} after"
        if options.noise
        else ""
    )
    say(f"denoise: {images.count} images in {job.folder / IMAGES}{gain}")
    return result


@dataclass(frozen=True)
class _Denoising:
    network: Network
    images: Images
    folder: Path
    noise: float
    seed: int
    resolution: int | None
    batch_size: int

    def make(self, numbers: Sequence[int], progress: Progress) -> list[dict[str, Any]]:
        """Write the pictures of some images; give their rows of the table."""
        rows: list[dict[str, Any]] = []
        for clean, given in self._batches(numbers):
            results = to_uint8(self.network.reconstruct(given)[1]).cpu()
            before, after = psnr(given.images, clean), psnr(results, clean)
            self._write(IMAGES, given, results)
            if self.noise:
                self._write(NOISY, given, given.images)
            for position, item in enumerate(given.items):
                values = {"before": float(before[position]), "after": float(after[position])}
                # JSON has no infinity, which is the PSNR of equal images
                rows.append(
                    {
                        "key": item.key,
                        **{name: value if math.isfinite(value) else None for name, value in values.items()},
                    }
                )
            progress.advance(len(given.items))
        return rows

    def _write(self, name: str, batch: Batch, images: Tensor) -> None:
        files = [self.folder / name / f"{item.key}.png" for item in batch.items]
        with ThreadPoolExecutor(WRITERS) as pool:  # each waits for the disk
            list(pool.map(write_png, files, images))

    def draw_examples(self) -> None:
        """The first images over what the model saw, where noise was added, over what it made of them."""
        rows: list[list[Tensor]] = [[], [], []]
        for clean, given in self._batches(range(min(_SHOWN, self.images.count))):
            results = to_uint8(self.network.reconstruct(given)[1]).cpu()
            for row, pictures in zip(rows, (clean, given.images, results), strict=True):
                row += [enlarge(rgb(picture)) for picture in pictures]
        write_png(self.folder / EXAMPLES, image_grid(rows if self.noise else [rows[1], rows[2]]))

    def _batches(self, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Batch]]:
        """Clean images, uint8, and the batch that the model is given."""
        no_labels = read_labels("none")[0]
        items = self.images.items(
            numbers, no_labels, channels=self.network.channels, resolution=self.resolution
        )
        for batch in batches(items, self.batch_size):
            clean = to_uint8(to_float(batch.images))
            if not self.noise:
                yield clean, batch
                continue
            draws = torch.stack([_normal(self.seed, item) for item in batch.items])
            noisy = add_noise(to_float(batch.images), draws, torch.full((len(draws),), self.noise))
            yield clean, Batch(batch.items, to_uint8(noisy))


def _normal(seed: int, item: Item) -> Tensor:
    """Standard normal numbers of an image, the same on every device and in every batch."""
    generator = keyed.generator("denoise", seed, item.key)
    return torch.randn(item.image.shape, generator=generator)


def _gain(parts: Parts) -> dict[str, Any]:
    columns: dict[str, list[float]] = {"before": [], "after": []}
    for row in parts.rows():
        for name, values in columns.items():
            values.append(math.inf if row[name] is None else row[name])
    intervals = {name: bootstrap_mean(values) for name, values in columns.items()}
    return {
        name: {"mean": interval.mean, "low": interval.low, "high": interval.high, "images": interval.n}
        for name, interval in intervals.items()
    }


def _decibels(interval: dict[str, Any]) -> str:
    return "infinite" if interval["mean"] is None else f"{interval['mean']:.2f} dB"

"""The pass over the images: load them, reconstruct them with every method, score them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentae.data.decode import MAX_PIXELS, decode_sample, image_kind
from latentae.data.shard_files import RawSample, read_samples
from latentae.data.shard_index import ShardIndex
from latentae.data.transforms import resize_and_center_crop, to_float, to_uint8
from latentae.errors import ImageError
from latentae.evaluation.measurement import MODEL, ORIGINALS, QUANTIZED, Measurement
from latentae.evaluation.methods.method import Method, Result, quantize
from latentae.measures.frechet import Extractor, as_rgb
from latentae.measures.latents.probe import pooled
from latentae.measures.metrics import TAPS, check_finite, psnr, ssim
from latentae.measures.perceptual_distance import Distance
from latentae.measures.scores import Scores
from latentae.models.base import Autoencoder, DiagonalGaussian

__all__ = ["Instruments", "Loaded", "load_images", "measure", "samples_at"]


@dataclass(frozen=True)
class Loaded:
    """One image, resized and cropped, or the reason why it can't be read.

    Attributes:
        position: in the shards.
        key: printable key.
        image: uint8 [C, R, R]; None if it can't be read.
        reason: why it can't be read.
        label: "" without one.
        enlarged, gray, deep: whether the file was smaller than R, gray, or of more than 8 bits.
    """

    position: int
    key: str
    image: Tensor | None
    reason: str = ""
    label: str = ""
    enlarged: bool = False
    gray: bool = False
    deep: bool = False

    @property
    def pixels(self) -> Tensor:
        """The image, where it must be readable because it was read before."""
        assert self.image is not None, (
            "an image that was read once can't be read again; the shards have changed"
        )
        return self.image


@dataclass(frozen=True)
class Instruments:
    """Everything that a batch of images is measured with.

    Attributes:
        model: in evaluation mode, on `device`.
        methods: baselines and other models, in the order of the table.
        distance: the perceptual distance.
        extractor: of features for the Frechet distance; None leaves it out.
        device: where the model is.
    """

    model: Autoencoder
    methods: Sequence[Method]
    distance: Distance
    extractor: Extractor | None
    device: torch.device

    def reconstruct(self, images: Tensor, keys: Sequence[str]) -> tuple[dict[str, Result], DiagonalGaussian]:
        """Reconstruct uint8 [B, C, R, R] on the device with the model and every method.

        Returns:
            The results by method, the model first, and the model's posterior.

        Raises:
            ModelError: a latent or reconstruction of the model is not finite.
        """
        posterior = self.model.encode(to_float(images))
        mode = posterior.mode()
        decoded = self.model.decode(mode)
        check_finite("reconstruction", keys, mode, decoded)
        stored, sizes = quantize(mode)
        results = {
            MODEL: Result(to_uint8(decoded)),
            QUANTIZED: Result(
                to_uint8(self.model.decode(stored)), {"bytes": [float(size) for size in sizes]}
            ),
        }
        for method in self.methods:
            results[method.name] = method(images, sizes)
        return results, posterior


def samples_at(index: ShardIndex, positions: Sequence[int]) -> Iterator[tuple[int, RawSample]]:
    """Read only the samples at these positions, counted through the shards in order.

    Args:
        index: the shards.
        positions: in ascending order.

    Yields:
        (position, sample).

    Raises:
        ShardError: a shard can't be read, or has changed since it was indexed.
    """
    start, rest = 0, list(positions)
    for number, entry in enumerate(index.shards):
        here = list(itertools.takewhile(lambda position, stop=start + entry.samples: position < stop, rest))
        found = read_samples(index, number, [position - start for position in here])
        yield from zip(here, found, strict=True)
        rest, start = rest[len(here) :], start + entry.samples


def load_images(
    samples: Iterable[tuple[int, RawSample]], resolution: int, channels: int, max_pixels: int = MAX_PIXELS
) -> Iterator[Loaded]:
    """Decode, resize and crop samples; an unreadable one has a reason instead of an image."""
    for position, raw in samples:
        key, label = printable(raw["__key__"]), _label(raw)
        try:
            kind = image_kind(raw)
            image = decode_sample(raw, channels=channels, max_pixels=max_pixels, short=resolution).image
        except ImageError as error:
            yield Loaded(position, key, None, printable(str(error)), label)
            continue
        enlarged = min(image.shape[1:]) < resolution
        cropped = resize_and_center_crop(image, resolution)
        yield Loaded(position, key, cropped, "", label, enlarged, kind.gray, kind.deep)


@torch.inference_mode()
def measure(instruments: Instruments, images: Iterable[Loaded], batch_size: int) -> Measurement:
    """Run the model and every method over images of one size.

    Raises:
        ModelError: a latent or reconstruction of the model is not finite.
    """
    found, stream = Measurement(), iter(images)
    while batch := list(itertools.islice(stream, batch_size)):
        found.skipped.extend((item.key, item.reason) for item in batch if item.image is None)
        if readable := [item for item in batch if item.image is not None]:
            _measure_batch(found, instruments, readable)
    return found


def _measure_batch(found: Measurement, instruments: Instruments, batch: Sequence[Loaded]) -> None:
    images = torch.stack([item.pixels for item in batch]).to(instruments.device)
    images = images.contiguous(memory_format=torch.channels_last)
    results, posterior = instruments.reconstruct(images, [item.key for item in batch])
    found.latents.add(posterior, to_float(images))
    found.latent_shape = tuple(posterior.mean.shape[1:])
    seen = instruments.distance.seen(as_rgb(images))
    for method, result in results.items():
        _score(found.scores.setdefault(method, Scores()), result, images, instruments.distance, seen)
    if instruments.extractor is not None:
        for method, result in {ORIGINALS: Result(images), **results}.items():
            features = instruments.extractor(result.images).cpu().float().numpy()
            features[sorted(result.missing)] = np.nan
            found.features.setdefault(method, []).append(features)
    labeled = [row for row, item in enumerate(batch) if item.label]
    if labeled:
        found.pooled.append(pooled(posterior.mean)[labeled].cpu().float().numpy())
    found.positions.extend(item.position for item in batch)
    found.keys.extend(item.key for item in batch)
    found.labels.extend(item.label for item in batch)
    for name in ("enlarged", "gray", "deep"):
        found.counts[name] += sum(getattr(item, name) for item in batch)


def _score(
    scores: Scores, result: Result, images: Tensor, distance: Distance, seen: Sequence[Tensor]
) -> None:
    """Add all metrics applicable at this image size; NaN for images without a result."""
    for name, values in result.numbers.items():
        scores.add(name, values)
    rows = [row for row in range(len(images)) if row not in result.missing]
    restored, originals = result.images[rows], images[rows]
    found = {"psnr": psnr(restored, originals)}
    if min(images.shape[-2:]) >= TAPS:
        found["ssim"] = ssim(restored, originals)
    if distance.module is not None:
        seen_rows = [layer[rows] for layer in seen]
        found["perceptual"] = distance.between(as_rgb(restored), seen_rows) if rows else torch.empty(0)
    for metric, values in found.items():
        column = torch.full((len(images),), math.nan, dtype=torch.float64)
        column[rows] = values.cpu().double()
        scores.add(metric, column)


def _label(raw: RawSample) -> str:
    value = raw.get("cls", b"")
    return value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else str(value)


def printable(text: str) -> str:
    """Escape the bytes of a tar name that is not UTF-8, so that text files can store it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")

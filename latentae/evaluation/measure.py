"""One pass over images: what the model and every other method make of them, and what the latents look like."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentae.data.decode import MAX_PIXELS, decode_sample, image_kind
from latentae.data.shard_files import RawSample
from latentae.data.transforms import resize_and_center_crop, to_float, to_uint8
from latentae.errors import ImageError, ModelError
from latentae.evaluation.methods.base import Made, Method
from latentae.evaluation.methods.quantised import quantise
from latentae.evaluation.part import ORIGINALS, Part
from latentae.measures.extractors import Extractor, as_rgb
from latentae.measures.latents.probe import pooled
from latentae.measures.metrics import TAPS, psnr, ssim
from latentae.measures.perceptual_distance import Distance
from latentae.measures.scores import Scores
from latentae.models.base import Autoencoder
from latentae.models.posterior import DiagonalGaussian

__all__ = ["MODEL", "QUANTISED", "Instruments", "Loaded", "load_images", "measure"]

MODEL, QUANTISED = "model", "latent_8bit"


@dataclass(frozen=True)
class Loaded:
    """One image as it is evaluated, or why it can't be."""

    position: int
    key: str
    image: Tensor | None
    """uint8 [C, R, R]; None where it can't be read."""
    reason: str = ""
    label: str = ""
    enlarged: bool = False
    gray: bool = False
    deep: bool = False


@dataclass(frozen=True)
class Instruments:
    """Everything that looks at a batch.

    Attributes:
        model: in evaluation mode, on `device`.
        methods: the others, in the order of the table.
        distance: the perceptual distance.
        extractor: of features for the Frechet distance; None leaves it out.
        device: where the model is.
    """

    model: Autoencoder
    methods: Sequence[Method]
    distance: Distance
    extractor: Extractor | None
    device: torch.device

    def reconstruct(self, images: Tensor, keys: Sequence[str]) -> tuple[dict[str, Made], DiagonalGaussian]:
        """What every method makes of uint8 [B, C, R, R] on the device, the model first, and the model's posterior.

        Raises:
            ModelError: the model's latent or reconstruction is not finite.
        """
        posterior = self.model.encode(to_float(images))
        mode = posterior.mode()
        exact = self.model.decode(mode)
        _check_finite(mode, exact, keys)
        stored, sizes = quantise(mode)
        made = {
            MODEL: Made(to_uint8(exact)),
            QUANTISED: Made(to_uint8(self.model.decode(stored)), {"bytes": [float(size) for size in sizes]}),
        }
        for method in self.methods:
            made[method.name] = method(images, sizes)
        return made, posterior


def _check_finite(latent: Tensor, image: Tensor, keys: Sequence[str]) -> None:
    finite = torch.isfinite(latent).flatten(1).all(1) & torch.isfinite(image).flatten(1).all(1)
    if not finite.all():
        key = keys[int((~finite).nonzero()[0])]
        raise ModelError(
            f"the reconstruction of {key} has NaN or infinite values; the model has diverged, evaluate an earlier checkpoint"
        )


def load_images(
    samples: Iterable[tuple[int, RawSample]], resolution: int, channels: int, max_pixels: int = MAX_PIXELS
) -> Iterator[Loaded]:
    """Decode, resize and crop samples; one that can't be read comes with the reason instead of an image."""
    for position, raw in samples:
        key, label = printable(raw["__key__"]), _label(raw)
        try:
            kind = image_kind(raw)
            image = decode_sample(raw, channels=channels, max_pixels=max_pixels, short=resolution).image
        except ImageError as error:
            yield Loaded(position, key, None, printable(str(error)), label)
            continue
        small = min(image.shape[1:]) < resolution
        cropped = resize_and_center_crop(image, resolution)
        yield Loaded(position, key, cropped, label=label, enlarged=small, gray=kind.gray, deep=kind.deep)


@torch.inference_mode()
def measure(instruments: Instruments, images: Iterable[Loaded], batch_size: int) -> Part:
    """Run the model and every method over images.

    Args:
        instruments: what looks at them.
        images: of one size, from `load_images`.
        batch_size: images at a time.

    Raises:
        ModelError: a latent or a reconstruction of the model is not finite.
    """
    part, stream = Part(), iter(images)
    while batch := list(itertools.islice(stream, batch_size)):
        part.skipped.extend((item.key, item.reason) for item in batch if item.image is None)
        sound = [item for item in batch if item.image is not None]
        if sound:
            _measure_batch(part, instruments, sound)
    return part


def _measure_batch(part: Part, instruments: Instruments, batch: Sequence[Loaded]) -> None:
    images = torch.stack([item.image for item in batch if item.image is not None]).to(instruments.device)
    images = images.contiguous(memory_format=torch.channels_last)
    made, posterior = instruments.reconstruct(images, [item.key for item in batch])
    part.latents.add(posterior, to_float(images))
    part.latent_shape = tuple(posterior.mean.shape[1:])
    seen = instruments.distance.seen(as_rgb(images))
    for method, result in made.items():
        _score(part.scores.setdefault(method, Scores()), result, images, instruments.distance, seen)
    if instruments.extractor is not None:
        part.features.setdefault(ORIGINALS, []).append(_features(instruments.extractor, images, frozenset()))
        for method, result in made.items():
            part.features.setdefault(method, []).append(
                _features(instruments.extractor, result.images, result.missing)
            )
    labelled = [row for row, item in enumerate(batch) if item.label]
    if labelled:
        part.pooled.append(pooled(posterior.mean)[labelled].cpu().float().numpy())
    part.positions.extend(item.position for item in batch)
    part.keys.extend(item.key for item in batch)
    part.labels.extend(item.label for item in batch)
    for name in ("enlarged", "gray", "deep"):
        part.counts[name] = part.counts.get(name, 0) + sum(getattr(item, name) for item in batch)


def _score(scores: Scores, made: Made, images: Tensor, distance: Distance, seen: Sequence[Tensor]) -> None:
    """Every metric that there is for images of this size, of the images that there is a result for; NaN for the others."""
    for name, values in made.numbers.items():
        scores.add(name, values)
    rows = [row for row in range(len(images)) if row not in made.missing]
    restored, originals = made.images[rows], images[rows]
    found = {"psnr": psnr(restored, originals)}
    if min(images.shape[-2:]) >= TAPS:
        found["ssim"] = ssim(restored, originals)
    if distance.module is not None:
        found["perceptual"] = (
            distance.between(as_rgb(restored), [layer[rows] for layer in seen]) if rows else torch.empty(0)
        )
    for metric, values in found.items():
        column = torch.full((len(images),), math.nan, dtype=torch.float64)
        column[rows] = values.cpu().double()
        scores.add(metric, column)


def _features(extractor: Extractor, images: Tensor, missing: frozenset[int]) -> np.ndarray:
    found = extractor(images).cpu().float().numpy()
    found[sorted(missing)] = np.nan
    return found


def _label(raw: RawSample) -> str:
    value = raw.get("cls", b"")
    return value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else str(value)


def printable(text: str) -> str:
    """Tar names may be no UTF-8; Python then carries the bytes as surrogates, which no text file takes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")

"""What is evaluated, beside what, and how: everything checked before any work, and the methods fitted when they are needed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from latentae.data.headers import MAX_PIXELS
from latentae.data.loader import Batch
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import ShardIndex, load_index
from latentae.device import choose_device
from latentae.errors import DataError, ModelError, RecipeError
from latentae.evaluation.measure import MODEL, QUANTISED, Instruments
from latentae.evaluation.methods.base import Method
from latentae.evaluation.methods.dct import BlockDCT, Dct, DctVariances
from latentae.evaluation.methods.jpeg import Jpeg
from latentae.evaluation.methods.model import ModelMethod
from latentae.evaluation.methods.pca import Pca
from latentae.evaluation.methods.webp import WebP
from latentae.evaluation.part import ORIGINALS
from latentae.evaluation.work import spread
from latentae.measures.extractors import Extractor, choose_extractor
from latentae.measures.perceptual_distance import Distance, choose_distance
from latentae.measures.training_data import (
    TrainingData,
    given_training_data,
    recorded_training_data,
    training_images,
)
from latentae.models.base import Autoencoder
from latentae.models.foreign import load_any_model
from latentae.models.pca import MAX_PATCH_NUMBERS, PatchPCA, fit_pca, sketch_pca
from latentae.models.pretrained import ModelSource

__all__ = ["DCT", "JPEG", "PCA", "PCA_IMAGES", "WEBP", "Compared", "Setting", "prepare"]

PCA, DCT, JPEG, WEBP = "pca", "dct", "jpeg", "webp"
WIDER = 4  # times as many components as the latent has channels are fitted, where the covariance is small enough to hold them all
PCA_IMAGES = 2000  # PCA of f x f patches is settled long before; more only takes longer


@dataclass(frozen=True)
class Compared:
    """A model beside the one that is evaluated."""

    name: str
    label: str
    source: ModelSource
    model: Autoencoder


@dataclass(frozen=True)
class Setting:
    """What is evaluated and how."""

    model: Autoencoder
    source: ModelSource
    compared: tuple[Compared, ...]
    index: ShardIndex
    limit: int | None
    resolution: int
    batch_size: int
    training: TrainingData
    training_given: bool
    seed: int
    perceptual: str
    distance: Distance
    frechet: str
    extractor: Extractor | str
    details: bool
    diffusability: bool
    device: torch.device
    max_pixels: int = MAX_PIXELS
    missing: dict[str, str] = field(default_factory=dict)
    """Methods that can't be measured, and why; filled when the methods are fitted."""

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.source.config.in_channels

    def training_images(self, wanted: int) -> Iterator[Batch]:
        """About `wanted` images of the model's training data."""
        limit = max(self.max_pixels, self.training.max_pixels)
        return training_images(
            self.training,
            self.resolution,
            self.batch_size,
            wanted,
            self.seed,
            channels=self.channels,
            max_pixels=limit,
        )

    @cached_property
    def positions(self) -> list[int]:
        """Of the images in the shards, in order."""
        samples = self.index.samples
        return (
            list(range(samples))
            if self.limit is None or self.limit >= samples
            else spread(samples, self.limit)
        )

    @property
    def total(self) -> int:
        """Images that will be looked at."""
        return len(self.positions)

    def inputs(self) -> dict[str, Any]:
        """What makes two evaluations the same, as plain JSON values."""
        return {
            "model": self.source.fingerprint,
            "compare": [other.source.fingerprint for other in self.compared],
            "shards": self.index.digest,
            "resolution": self.resolution,
            "limit": self.limit,
            "perceptual": self.perceptual,
            "frechet": self.frechet,
            "details": self.details,
            "diffusability": self.diffusability,
            "pca_shards": self.training.index.digest if self.training_given and self.training.index else None,
            "seed": self.seed,
            **({} if self.max_pixels == MAX_PIXELS else {"max_pixels": self.max_pixels}),
        }

    def instruments(self) -> Instruments:
        """Everything that looks at a batch."""
        extractor = self.extractor if isinstance(self.extractor, Extractor) else None
        return Instruments(self.model, self.methods, self.distance, extractor, self.device)

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        """Beside the model: the models compared, then the baselines that there are."""
        pca, dct = self.bases
        found: list[Method] = [ModelMethod(other.name, other.label, other.model) for other in self.compared]
        z = self.source.config.latent_channels
        found += [Pca(pca.truncated(z))] if pca else []
        found += [Dct(dct.truncated(z))] if dct else []
        for codec in (Jpeg(), WebP()):
            if reason := codec.refuses(self.channels):
                self.missing[codec.name] = reason
            else:
                found.append(codec)
        return tuple(found)

    @cached_property
    def bases(self) -> tuple[PatchPCA | None, BlockDCT | None]:
        """PCA and DCT, fitted in one pass over training images, with more components than the latent has channels where that costs
        nothing (for rate and distortion); None with a reason in `missing`.

        Raises:
            DataError: shards that the user named do not suffice.
        """
        config = self.source.config
        f, z = config.downsampling, config.latent_channels
        numbers = self.channels * f * f
        reason = ""
        if z > numbers:
            reason = f"a patch of {f} x {f} pixels has fewer numbers than the latent has channels ({z})"
        elif self.training.index is None:
            reason = f"{self.training.reason}; name images to fit it on with pca_shards"
        if reason:
            self.missing.update({PCA: reason, DCT: reason})
            return None, None
        small = numbers <= MAX_PATCH_NUMBERS
        components = min(WIDER * z, numbers) if small else z
        images = self.training_images(PCA_IMAGES)
        variances = DctVariances(f)
        batches = variances.watch(batch.images.to(self.device) for batch in images)
        try:
            pca = (fit_pca if small else sketch_pca)(batches, f, components)
        except DataError as error:
            if self.training_given:
                raise
            self.missing[PCA] = str(error)
            pca = None
        try:
            return pca, variances.best(components)
        except DataError as error:
            self.missing[DCT] = str(error)
            return pca, None


def prepare(
    model: str | Path,
    shards: str | Path | Sequence[str | Path],
    *,
    compare: Sequence[str | Path],
    resolution: int | None,
    batch_size: int,
    limit: int | None,
    perceptual: str,
    frechet: str,
    details: bool,
    diffusability: bool,
    pca_shards: str | Path | Sequence[str | Path] | None,
    seed: int,
    weights: str,
    device: str,
    max_pixels: int = MAX_PIXELS,
) -> Setting:
    """Check everything that `evaluate` was asked for; see there for the options and errors."""
    if batch_size < 1 or (limit is not None and limit < 1):
        raise RecipeError(f"batch_size is {batch_size} and limit is {limit}; both must be at least 1")
    where = choose_device(device)
    network, source = load_any_model(model, weights, where)
    size = _resolution(source, resolution)
    training = recorded_training_data(source) if pca_shards is None else given_training_data(pca_shards)
    index = load_index(expand_shards(shards))
    extractor = choose_extractor(frechet, size, where)
    if diffusability and isinstance(extractor, str):
        raise RecipeError(f"diffusability is told by a Frechet distance, and there is none: {extractor}")
    return Setting(
        model=network,
        source=source,
        compared=_load_compared(compare, source, size, weights, where),
        index=index,
        limit=limit,
        resolution=size,
        batch_size=batch_size,
        training=training,
        training_given=pca_shards is not None,
        seed=seed,
        perceptual=perceptual,
        distance=choose_distance(perceptual, size, where),
        frechet=frechet,
        extractor=extractor,
        details=details,
        diffusability=diffusability,
        device=where,
        max_pixels=max_pixels,
    )


def _resolution(source: ModelSource, asked: int | None) -> int:
    size = source.resolution if asked is None else asked
    source.check_side(size)
    source.check_channels()
    return size


def _load_compared(
    paths: Sequence[str | Path], source: ModelSource, size: int, weights: str, device: torch.device
) -> tuple[Compared, ...]:
    taken = {ORIGINALS, MODEL, QUANTISED, PCA, DCT, JPEG, WEBP, "original", "heat"}
    found = []
    for path in paths:
        model, other = load_any_model(path, weights, device)
        config = other.config
        if (config.in_channels, config.out_channels) != (
            source.config.in_channels,
            source.config.out_channels,
        ):
            raise ModelError(
                f"{path} has {config.in_channels} channels in and {config.out_channels} out, the model it is compared with "
                f"{source.config.in_channels} and {source.config.out_channels}; compare models of the same images"
            )
        other.check_side(size)
        label = Path(path).name or str(path)
        name = _free(re.sub(r"[^A-Za-z0-9.-]+", "-", label).strip("-.").lower() or "model", taken)
        found.append(
            Compared(name, label if name.endswith(label.lower()) else f"{label} ({name})", other, model)
        )
    return tuple(found)


def _free(name: str, taken: set[str]) -> str:
    """`name`, or with the first number that makes it another than those before."""
    unique, number = name, 2
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    taken.add(unique)
    return unique

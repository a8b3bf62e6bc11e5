"""Inputs of an evaluation, loaded and checked: models, images, metrics and baselines."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from latentae.data.headers import MAX_PIXELS
from latentae.data.loader import Batch, image_batches
from latentae.data.order import is_held_out
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import ShardIndex, load_index
from latentae.device import choose_device
from latentae.errors import DataError, ModelError, RecipeError, ShardError
from latentae.evaluation.measure_images import Instruments, Loaded, load_images, samples_at
from latentae.evaluation.measurement import MODEL, ORIGINALS, QUANTIZED, spread
from latentae.evaluation.methods.codecs import Jpeg, WebP
from latentae.evaluation.methods.dct import BlockDCT, DctVariances
from latentae.evaluation.methods.method import Method, ModelMethod, PatchMethod
from latentae.evaluation.options import EvaluateOptions
from latentae.measures.frechet import Extractor, choose_extractor
from latentae.measures.perceptual_distance import Distance, choose_distance
from latentae.models.base import Autoencoder
from latentae.models.foreign import load_any_model
from latentae.models.pca import MAX_PATCH_NUMBERS, PatchPCA, fit_pca, sketch_pca
from latentae.models.pretrained import ModelSource
from latentae.options import identity
from latentae.progress import Progress

__all__ = ["BASELINES", "PCA_IMAGES", "LoadedInputs", "LoadedModel", "load_inputs"]

BASELINES = {
    "pca": "PCA with as many floats",
    "dct": "Block DCT with as many floats",
    Jpeg.name: Jpeg.label,
    WebP.name: WebP.label,
}
PCA_IMAGES = 2000  # more images change PCA of f x f patches little
EXTRA_COMPONENTS = 4  # times the latent channels are fitted for rate and distortion, if that costs nothing


@dataclass(frozen=True)
class LoadedModel:
    """A model to measure, on the device.

    Attributes:
        name: key in metrics.json.
        label: name in tables.
        model: in evaluation mode.
        source: where it comes from.
    """

    name: str
    label: str
    model: Autoencoder
    source: ModelSource


@dataclass(frozen=True)
class TrainingData:
    """Shards a model was trained on.

    Attributes:
        index: None if they are unknown or gone.
        held_out: fraction of their samples held out of training by key.
        reason: why there are none.
        max_pixels: the training's limit of pixels per image.
    """

    index: ShardIndex | None
    held_out: float = 0.0
    reason: str = ""
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class LoadedInputs:
    """Everything an evaluation needs.

    Attributes:
        options: of the verb.
        device: where models and metrics run.
        models: the model to evaluate, then the models to compare it with.
        index: shards of the images.
        resolution: image side in pixels.
        training: images to fit the baselines on.
        distance: the perceptual distance.
        extractor: of features for the Frechet distance, or why there is none.
        missing: baselines that can't be measured, and why; filled when they are fitted.
    """

    options: EvaluateOptions
    device: torch.device
    models: tuple[LoadedModel, ...]
    index: ShardIndex
    resolution: int
    training: TrainingData
    distance: Distance
    extractor: Extractor | str
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Autoencoder:
        """The model to evaluate."""
        return self.models[0].model

    @property
    def source(self) -> ModelSource:
        """Where the model to evaluate comes from."""
        return self.models[0].source

    @property
    def compared(self) -> tuple[LoadedModel, ...]:
        """The models that it is compared with."""
        return self.models[1:]

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.source.config.in_channels

    @cached_property
    def positions(self) -> list[int]:
        """Positions of the evaluated images in the shards."""
        samples, limit = self.index.samples, self.options.limit
        return list(range(samples)) if limit is None or limit >= samples else spread(samples, limit)

    def images_at(self, positions: list[int]) -> Iterator[Loaded]:
        """Load the images at some positions, in ascending order."""
        samples = samples_at(self.index, positions)
        return load_images(samples, self.resolution, self.channels, self.options.max_pixels)

    def training_images(self, wanted: int) -> Iterator[Batch]:
        """About `wanted` training images uint8 [B, C, R, R] and their keys.

        Each shard gives equally many, without held-out images.
        """
        training = self.training
        entries = [entry for entry in training.index.shards if entry.samples] if training.index else []
        random.Random(self.options.seed).shuffle(entries)
        options: dict[str, Any] = {
            "limit": math.ceil(wanted / max(len(entries), 1)),
            "channels": self.channels,
            "max_pixels": max(self.options.max_pixels, training.max_pixels),
        }
        with Progress("reading training images", None) as progress:
            for entry in entries[:wanted]:
                for batch in image_batches([entry.path], self.resolution, self.options.batch_size, **options):
                    kept = [i for i, key in enumerate(batch.keys) if not is_held_out(key, training.held_out)]
                    progress.advance(len(kept))
                    if kept:
                        yield Batch(tuple(batch.keys[i] for i in kept), batch.images[kept])

    def identity(self) -> dict[str, Any]:
        """Plain JSON values that are equal for equal evaluations."""
        given = self.options.pca_shards is not None and self.training.index is not None
        return {
            "model": self.source.fingerprint,
            "compare": [other.source.fingerprint for other in self.compared],
            "shards": self.index.digest,
            **identity(self.options),
            "resolution": self.resolution,
            "pca_shards": self.training.index.digest if given and self.training.index else None,
        }

    def instruments(self) -> Instruments:
        """Everything that a batch of images is measured with."""
        extractor = self.extractor if isinstance(self.extractor, Extractor) else None
        return Instruments(self.model, self.methods, self.distance, extractor, self.device)

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        """The compared models, then the baselines that can be measured."""
        z = self.source.config.latent_channels
        found: list[Method] = [ModelMethod(other.name, other.label, other.model) for other in self.compared]
        found += [
            PatchMethod(name, BASELINES[name], basis.truncated(z))
            for name, basis in zip(("pca", "dct"), self.bases, strict=True)
            if basis
        ]
        for codec in (Jpeg(), WebP()):
            if reason := codec.refuses(self.channels):
                self.missing[codec.name] = reason
            else:
                found.append(codec)
        return tuple(found)

    @cached_property
    def bases(self) -> tuple[PatchPCA | None, BlockDCT | None]:
        """PCA and DCT, fitted in one pass over training images; None with a reason in `missing`.

        Raises:
            DataError: the shards given as `pca_shards` have too few images.
        """
        f, z = self.source.config.downsampling, self.source.config.latent_channels
        numbers = self.channels * f * f
        reason = ""
        if z > numbers:
            reason = f"a patch of {f} x {f} pixels has fewer numbers than the latent has channels ({z})"
        elif self.training.index is None:
            reason = f"{self.training.reason}; name images to fit it on with pca_shards"
        if reason:
            self.missing.update({"pca": reason, "dct": reason})
            return None, None
        small = numbers <= MAX_PATCH_NUMBERS
        components = min(EXTRA_COMPONENTS * z, numbers) if small else z
        variances, pca, dct = DctVariances(f), None, None
        batches = variances.watch(batch.images.to(self.device) for batch in self.training_images(PCA_IMAGES))
        try:
            pca = (fit_pca if small else sketch_pca)(batches, f, components)
        except DataError as error:
            if self.options.pca_shards is not None:
                raise
            self.missing["pca"] = str(error)
        try:
            dct = variances.best(components)
        except DataError as error:
            self.missing["dct"] = str(error)
        return pca, dct


def load_inputs(options: EvaluateOptions) -> LoadedInputs:
    """Load the models and check everything else that `evaluate` needs; see there for the errors."""
    device = choose_device(options.device)
    model, source = load_any_model(options.model, options.weights, device)
    resolution = source.resolution if options.resolution is None else options.resolution
    source.check_side(resolution)
    source.check_channels()
    training = (
        _training_data(source)
        if options.pca_shards is None
        else TrainingData(load_index(expand_shards(options.pca_shards)))
    )
    index = load_index(expand_shards(options.shards))
    extractor = choose_extractor(options.frechet, resolution, device)
    if options.diffusability and isinstance(extractor, str):
        raise RecipeError(f"diffusability needs a Frechet distance, and there is none: {extractor}")
    models = [LoadedModel(MODEL, "this model", model, source)]
    taken = {ORIGINALS, MODEL, QUANTIZED, *BASELINES, "original", "heat"}
    for path in options.compare or ():
        other, its_source = load_any_model(path, options.weights, device)
        _check_compared(its_source, source, path, resolution)
        label = Path(path).name or str(path)
        name = _free_name(re.sub(r"[^A-Za-z0-9.-]+", "-", label).strip("-.").lower() or "model", taken)
        label = label if name.endswith(label.lower()) else f"{label} ({name})"
        models.append(LoadedModel(name, label, other, its_source))
    distance = choose_distance(options.perceptual, resolution, device)
    return LoadedInputs(options, device, tuple(models), index, resolution, training, distance, extractor)


def _check_compared(other: ModelSource, source: ModelSource, path: object, resolution: int) -> None:
    theirs, ours = other.config, source.config
    if (theirs.in_channels, theirs.out_channels) != (ours.in_channels, ours.out_channels):
        raise ModelError(
            f"{path} has {theirs.in_channels} channels in and {theirs.out_channels} out, the evaluated model "
            "has "
            f"{ours.in_channels} and {ours.out_channels}; compare models of the same images"
        )
    other.check_side(resolution)


def _free_name(name: str, taken: set[str]) -> str:
    """`name`, with a number if it is taken."""
    unique, number = name, 2
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    taken.add(unique)
    return unique


def _training_data(source: ModelSource) -> TrainingData:
    """The training shards of a run or checkpoint, from its resolved recipe."""
    recipe = source.recipe()
    if recipe is None:
        return TrainingData(None, reason="the model does not say what it was trained on")
    data = recipe.get("data", {})
    if not data.get("shards"):
        return TrainingData(None, reason="the model's recipe names no shards")
    try:
        index = load_index(expand_shards(data["shards"]), data.get("index"))
    except ShardError as error:
        return TrainingData(None, reason=f"the training shards can't be read any more ({error})")
    held_out = data.get("validation_fraction", 0.0) if data.get("validation", "auto") == "auto" else 0.0
    return TrainingData(index, float(held_out), max_pixels=int(data.get("max_pixels", MAX_PIXELS)))

"""The training data of a model, as recorded in its recipe, for fitting baselines."""

from __future__ import annotations

import math
import random
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentae.data.headers import MAX_PIXELS
from latentae.data.loader import Batch, image_batches
from latentae.data.order import is_held_out
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import ShardIndex, load_index
from latentae.errors import ShardError
from latentae.file_names import RECIPE
from latentae.models.pretrained import ModelSource
from latentae.progress import Progress

__all__ = ["TrainingData", "recorded_recipe", "recorded_training_data", "training_images"]


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


def recorded_training_data(source: ModelSource) -> TrainingData:
    """The training shards of a run or checkpoint, from its resolved recipe."""
    recipe = recorded_recipe(source)
    if recipe is None:
        return TrainingData(None, reason="the model does not say what it was trained on")
    data = recipe.get("data", {})
    if not data.get("shards"):
        return TrainingData(None, reason="the recipe beside the model names no shards")
    try:
        index = load_index(expand_shards(data["shards"]), data.get("index"))
    except ShardError as error:
        return TrainingData(None, reason=f"the training shards can't be read any more ({error})")
    held_out = data.get("validation_fraction", 0.0) if data.get("validation", "auto") == "auto" else 0.0
    return TrainingData(index, float(held_out), max_pixels=int(data.get("max_pixels", MAX_PIXELS)))


def recorded_recipe(source: ModelSource) -> dict[str, Any] | None:
    """The resolved recipe of a run or checkpoint; None for other models."""
    for folder in (source.weights_file.parent, Path(source.path)):
        try:
            return tomllib.loads((folder / RECIPE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return None


def training_images(
    training: TrainingData,
    resolution: int,
    batch_size: int,
    wanted: int,
    seed: int,
    *,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Batch]:
    """About `wanted` training images uint8 [B, C, R, R] and their keys.

    Each shard gives equally many, without held-out images.
    """
    entries = [entry for entry in training.index.shards if entry.samples] if training.index else []
    random.Random(seed).shuffle(entries)
    share = math.ceil(wanted / max(len(entries), 1))
    with Progress("reading training images", None) as progress:
        for entry in entries[:wanted]:
            options: dict[str, Any] = {"limit": share, "channels": channels, "max_pixels": max_pixels}
            for batch in image_batches([entry.path], resolution, batch_size, **options):
                kept = [i for i, key in enumerate(batch.keys) if not is_held_out(key, training.held_out)]
                progress.advance(len(kept))
                if kept:
                    yield Batch(tuple(batch.keys[i] for i in kept), batch.images[kept])

"""What a model was trained on, as its checkpoint recorded it: the PCA baseline is fitted on it, and overlaps are reported."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentae.data.shards import expand_shards
from latentae.errors import ShardError
from latentae.models.pretrained import ModelSource

__all__ = ["TrainingData", "recorded_training_data"]

RECIPE = "recipe.toml"


@dataclass(frozen=True)
class TrainingData:
    """Shards a model was trained on.

    Attributes:
        shards: paths; empty when they are not known or gone.
        held_out: fraction of their samples kept out of training by key.
        reason: why there are none.
    """

    shards: tuple[str, ...]
    held_out: float = 0.0
    reason: str = ""


def recorded_training_data(source: ModelSource) -> TrainingData:
    """Find the training shards of a run or checkpoint in its resolved recipe."""
    recipe = _recipe(source)
    if recipe is None:
        return TrainingData((), reason="the model does not say what it was trained on")
    data = recipe.get("data", {})
    if not data.get("shards"):
        return TrainingData((), reason="the recipe beside the model names no shards")
    try:
        shards = tuple(expand_shards(data["shards"]))
    except ShardError as error:
        return TrainingData((), reason=f"the training shards are not there any more ({error})")
    held_out = float(data.get("validation_fraction", 0.0)) if data.get("validation", "auto") == "auto" else 0.0
    return TrainingData(shards, held_out)


def _recipe(source: ModelSource) -> dict[str, Any] | None:
    for folder in (source.weights_file.parent, Path(source.path)):
        try:
            return tomllib.loads((folder / RECIPE).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there or not readable: an exported model has none
            continue
    return None

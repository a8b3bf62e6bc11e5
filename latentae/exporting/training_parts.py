"""Parts for further training: discriminator, learned parts of the losses, loss options.

Frozen networks (LPIPS, VGG, feature backbones) are in no checkpoint and in no export.
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

from latentae.errors import ModelError
from latentae.file_names import DISCRIMINATOR, RECIPE
from latentae.files import read_json, write_json
from latentae.models.pretrained import META, TRAINING, ModelSource
from latentae.models.weight_files import read_tensors

__all__ = ["copy_training_parts"]

PARTS = {
    DISCRIMINATOR: "the network trained against",
    "objective.safetensors": "what the losses learned",
    "lecam.safetensors": "LeCAM's running means of the logits",
}
NOTE = "training.json"
_PATHS = ("weights", "backbone_weights")  # of perceptual networks: files of the training machine


def copy_training_parts(source: ModelSource, folder: Path) -> dict[str, str]:
    """Copy a checkpoint's parts to `folder`/training.

    Returns:
        File name -> description; empty if the model is not from a run, or has no parts.

    Raises:
        ModelError: a part is damaged.
    """
    if source.kind not in ("run", "checkpoint"):
        return {}
    checkpoint = source.weights_file.parent
    found = {name: words for name, words in PARTS.items() if (checkpoint / name).is_file()}
    if not found:
        return {}
    (folder / TRAINING).mkdir()
    for name in found:
        read_tensors(checkpoint / name)
        shutil.copyfile(checkpoint / name, folder / TRAINING / name)
    write_json(folder / TRAINING / NOTE, _note(checkpoint))
    return {**found, NOTE: "step, images seen and the losses' options"}


def _note(checkpoint: Path) -> dict[str, Any]:
    """Progress of the training and its loss options, without paths of its machine."""
    try:
        meta = read_json(checkpoint / META)
        recipe = tomllib.loads((checkpoint / RECIPE).read_text(encoding="utf-8"))
        phases = [
            {"images": phase.get("images"), "loss": phase.get("loss", {})}
            for phase in recipe.get("phases", ())
        ]
        values = {name: meta[name] for name in ("latentae", "step", "images_seen")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{checkpoint} is damaged ({error!r}); export another checkpoint") from error
    return _without_paths({**values, "loss": recipe.get("loss", {}), "phases": phases})


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items() if key not in _PATHS}
    return [_without_paths(item) for item in value] if isinstance(value, list) else value

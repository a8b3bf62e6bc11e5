"""Results of earlier verbs: statistics of encode, metrics of evaluate, validation of a run.

Results of another model are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentae.errors import ModelError, RecipeError
from latentae.exporting.scaling import MeasuredLatents
from latentae.file_names import METRICS, STATISTICS
from latentae.files import read_json
from latentae.measures.scores import LABELS
from latentae.models.pretrained import META, ModelSource

__all__ = ["metric_text", "read_latents", "read_metrics", "read_validation"]

_PREFIX = "validation/"


def read_latents(path: str | Path, source: ModelSource) -> MeasuredLatents:
    """Latent statistics from an output folder of encode or evaluate, or from the JSON file in it.

    Args:
        path: folder or file.
        source: the model that the statistics must belong to.

    Raises:
        RecipeError: no such file, or no latent statistics in it.
        ModelError: they belong to another model.
    """
    file, channels = Path(path), source.config.latent_channels
    if file.is_dir():
        file = file / (STATISTICS if (file / STATISTICS).is_file() else METRICS)
    values = _read(file)
    try:
        if "latent" in values:
            latent, owner, images = values["latent"], values["model"]["fingerprint"], values["data"]["images"]
            mean, std = latent["channel_mean"], latent["channel_std"]
        else:
            latent, owner, images = values, values["model"], values["samples"]
            mean, std = latent["latents_mean"], latent["latents_std"]
        if owner != source.fingerprint:
            raise ModelError(
                f"{file} describes the latents of another model; measure this one, or give scaling_factor"
            )
        factors = float(latent["scaling_factor"]), float(latent["shift_factor"])
        measured = MeasuredLatents(*factors, tuple(map(float, mean)), tuple(map(float, std)), int(images))
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{file} has no latent statistics ({error!r}); give a finished output folder of encode"
        ) from error
    if not len(measured.mean) == len(measured.std) == channels:
        raise ModelError(f"{file} describes {len(measured.mean)} latent channels, the model has {channels}")
    return measured


def read_metrics(metrics: Mapping[str, Any] | str | Path | None, fingerprint: str) -> dict[str, str] | None:
    """Label -> text for the card, from evaluate's folder, file or return value, or from numbers.

    Raises:
        RecipeError: the file can't be read or is not an evaluation.
        ModelError: it belongs to another model.
    """
    if metrics is None:
        return None
    if isinstance(metrics, Mapping):
        values, where = metrics, "metrics"
    else:
        where = Path(metrics)
        where = where / METRICS if where.is_dir() else where
        values = _read(where)
    if "metrics" not in values:
        return {str(name): metric_text(value) for name, value in values.items()}
    try:
        if values["model"]["fingerprint"] != fingerprint:
            raise ModelError(f"{where} describes another model; evaluate this one")
        data, side = values["data"], values["data"]["resolution"]
        images = f"{data['images']}, at {side} x {side} pixels"
        return {"Images": images, **_labeled(values["metrics"], values["perceptual"]["name"])}
    except (KeyError, TypeError) as error:
        raise RecipeError(f"{where} is not an evaluation ({error!r}); give evaluate's output") from error


def read_validation(source: ModelSource, weights: str) -> dict[str, str] | None:
    """Label -> text from a run's log: the checkpoint's validation; None without one."""
    if source.metrics_log is None or weights != "ema":
        return None
    try:
        step = read_json(source.weights_file.with_name(META))["step"]
        lines = [json.loads(line) for line in source.metrics_log.read_text(encoding="utf-8").splitlines()]
        found = [
            {name.removeprefix(_PREFIX): value for name, value in line.items() if name.startswith(_PREFIX)}
            for line in lines
            if line["step"] == step
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # an export needs no log
        return None
    values = next((values for values in reversed(found) if values), {})
    rows = {name: value for name, value in values.items() if value is not None}
    if not rows:
        return None
    size = source.resolution
    images = f"the run's own held-out ones, at {size} x {size} pixels, after step {step}"
    return {"Images": images, **_labeled(rows, "Perceptual distance of the training")}


def _labeled(values: Mapping[str, Any], perceptual: str) -> dict[str, str]:
    labels = {**LABELS, "perceptual": perceptual}
    return {str(labels.get(name, name)): metric_text(value) for name, value in values.items()}


def metric_text(value: Any) -> str:
    """24.61 (95 % interval 24.10 to 25.13), from a mean with its interval or from a number."""
    if isinstance(value, Mapping):
        if value["mean"] is None:
            return "no finite value"
        low, high = value["low"], value["high"]
        interval = "" if low is None else f" (95 % interval {low:.4g} to {high:.4g})"
        return f"{value['mean']:.4g}{interval}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _read(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"could not read {file} ({error}); give an output folder of encode or evaluate"
        ) from error
    if not isinstance(values, dict):
        found = type(values).__name__
        raise RecipeError(
            f"{file} is a {found}, expected an object; give an output folder of encode or evaluate"
        )
    return values

"""Reading what was measured elsewhere: latent statistics of `encode`, metrics of `evaluate`.

An export measures nothing itself. It takes numbers from the files of the two verbs that do, and refuses those of another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentae.errors import ModelError, RecipeError
from latentae.files import read_json

__all__ = ["MeasuredLatents", "read_latents", "read_metrics"]

STATISTICS, METRICS = "statistics.json", "metrics.json"
LABELS = {"psnr": "PSNR (dB)", "ssim": "SSIM"}


@dataclass(frozen=True)
class MeasuredLatents:
    """Statistics of sampled latents over some images."""

    scaling_factor: float
    shift_factor: float
    mean: tuple[float, ...]
    """By channel."""
    std: tuple[float, ...]
    """By channel."""
    images: int


def read_latents(path: str | Path, fingerprint: str, channels: int) -> MeasuredLatents:
    """Latent statistics from an output folder of `encode` or `evaluate`, or from the JSON file in it.

    Args:
        path: folder or file.
        fingerprint: of the model they must belong to.
        channels: that it has.

    Raises:
        RecipeError: there are none, or they give no scaling factor.
        ModelError: they belong to another model.
    """
    file = Path(path)
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
        if owner != fingerprint:
            raise ModelError(f"{file} describes the latents of another model; measure this one, or give the scaling factor")
        factors = float(latent["scaling_factor"]), float(latent["shift_factor"])
        measured = MeasuredLatents(*factors, tuple(map(float, mean)), tuple(map(float, std)), int(images))
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"{file} has no latent statistics ({error!r}); give a finished output folder of encode") from error
    if not len(measured.mean) == len(measured.std) == channels:
        raise ModelError(f"{file} describes {len(measured.mean)} latent channels, the model has {channels}")
    return measured


def read_metrics(metrics: Mapping[str, Any] | str | Path | None, fingerprint: str) -> dict[str, str] | None:
    """What a card says of quality, label -> text, from `evaluate` (its folder, file or return value) or from name -> number.

    Raises:
        RecipeError: the file can't be read.
        ModelError: it belongs to another model.
    """
    if metrics is None:
        return None
    if isinstance(metrics, Mapping):
        values, where = metrics, "the metrics given"
    else:
        where = Path(metrics)
        where = where / METRICS if where.is_dir() else where
        values = _read(where)
    if "metrics" not in values:
        return {str(name): _text(value) for name, value in values.items()}
    try:
        if values["model"]["fingerprint"] != fingerprint:
            raise ModelError(f"{where} describes another model; evaluate this one")
        labels = {**LABELS, "perceptual": values["perceptual"]["name"]}
        rows = {labels.get(name, name): _text(value) for name, value in values["metrics"].items()}
        data = values["data"]
        return {"Images": f"{data['images']}, at {data['resolution']} x {data['resolution']} pixels", **rows}
    except (KeyError, TypeError) as error:
        raise RecipeError(f"{where} is no evaluation ({error!r}); give what evaluate writes") from error


def _text(value: Any) -> str:
    """24.61 (95 % interval 24.10 to 25.13), of a mean and its interval or of a bare number."""
    if isinstance(value, Mapping):
        if value["mean"] is None:
            return "no finite value"
        interval = "" if value["low"] is None else f" (95 % interval {value['low']:.4g} to {value['high']:.4g})"
        return f"{value['mean']:.4g}{interval}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _read(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise RecipeError(f"could not read {file} ({error}); give what encode or evaluate wrote") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{file} holds a {type(values).__name__}, expected an object; give what encode or evaluate wrote")
    return values

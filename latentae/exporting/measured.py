"""Reading what was measured elsewhere: latent statistics of `encode`, metrics of `evaluate`, a run's last validation.

Numbers of another model are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentae.errors import ModelError, RecipeError
from latentae.file_names import METRICS, STATISTICS
from latentae.files import read_json
from latentae.models.pretrained import META, ModelSource

__all__ = ["MeasuredLatents", "metric_text", "read_latents", "read_metrics", "read_validation"]

_PREFIX = "validation/"
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

    def to_json(self, fingerprint: str) -> dict[str, Any]:
        """As `encode` writes them, so that `read_latents` reads them for the model of this fingerprint."""
        return {
            "model": fingerprint,
            "samples": self.images,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "latents_mean": list(self.mean),
            "latents_std": list(self.std),
        }


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
            raise ModelError(
                f"{file} describes the latents of another model; measure this one, or give the scaling factor"
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
        return {str(name): metric_text(value) for name, value in values.items()}
    try:
        if values["model"]["fingerprint"] != fingerprint:
            raise ModelError(f"{where} describes another model; evaluate this one")
        labels = {**LABELS, "perceptual": values["perceptual"]["name"]}
        rows = {str(labels.get(name, name)): metric_text(value) for name, value in values["metrics"].items()}
        data = values["data"]
        return {"Images": f"{data['images']}, at {data['resolution']} x {data['resolution']} pixels", **rows}
    except (KeyError, TypeError) as error:
        raise RecipeError(f"{where} is no evaluation ({error!r}); give what evaluate writes") from error


def read_validation(source: ModelSource, weights: str) -> dict[str, str] | None:
    """What a run's log says of its checkpoint's EMA weights on held-out images, label -> text; None where it says nothing."""
    if source.metrics_log is None or weights != "ema":
        return None
    try:
        step = read_json(source.weights_file.with_name(META))["step"]
        lines = [json.loads(line) for line in source.metrics_log.read_text(encoding="utf-8").splitlines()]
        values = next(
            line
            for line in reversed(lines)
            if line["step"] == step and any(name.startswith(_PREFIX) for name in line)
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        StopIteration,
    ):  # a log is no part of a model; without it nothing is known
        return None
    labels = {**LABELS, "perceptual": "Perceptual distance of the training"}
    found = {
        name.removeprefix(_PREFIX): value
        for name, value in values.items()
        if name.startswith(_PREFIX) and value is not None
    }
    rows = {str(labels.get(name, name)): metric_text(value) for name, value in found.items()}
    size = source.resolution
    return (
        {"Images": f"the run's own held-out ones, at {size} x {size} pixels, after step {step}", **rows}
        if rows
        else None
    )


def metric_text(value: Any) -> str:
    """24.61 (95 % interval 24.10 to 25.13), of a mean and its interval or of a bare number."""
    if isinstance(value, Mapping):
        if value["mean"] is None:
            return "no finite value"
        interval = (
            "" if value["low"] is None else f" (95 % interval {value['low']:.4g} to {value['high']:.4g})"
        )
        return f"{value['mean']:.4g}{interval}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _read(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise RecipeError(f"could not read {file} ({error}); give what encode or evaluate wrote") from error
    if not isinstance(values, dict):
        raise RecipeError(
            f"{file} holds a {type(values).__name__}, expected an object; give what encode or evaluate wrote"
        )
    return values

"""From a measurement to what metrics.json holds: summaries, baselines, findings and the conventions they rest on."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import latentae
from latentae.data.index import ShardIndex
from latentae.evaluation.distance import Distance
from latentae.evaluation.measure import JPEG, MODEL, PCA, QUANTISED, Measurement
from latentae.evaluation.summary import finding, metric_label, paired
from latentae.evaluation.training_data import TrainingData
from latentae.models.pca import PatchPCA
from latentae.models.pretrained import ModelSource

__all__ = ["FORMAT_VERSION", "PCA_IMAGES", "Setting", "summarise"]

FORMAT_VERSION = 1
PCA_IMAGES = 2000  # PCA of f x f patches is settled long before; more only takes longer


@dataclass(frozen=True)
class Setting:
    """What was evaluated and how."""

    source: ModelSource
    index: ShardIndex
    resolution: int
    training: TrainingData
    seed: int
    distance: Distance
    device: torch.device


def summarise(setting: Setting, measurement: Measurement, pca: PatchPCA | str, parameters: int) -> dict[str, Any]:
    """Everything as plain JSON values.

    Args:
        setting: what was evaluated and how.
        measurement: what `measure` gave.
        pca: the fitted PCA, or why there is none.
        parameters: of the model.
    """
    source, index, seed = setting.source, setting.index, setting.seed
    z, height, width = measurement.latent_shape
    pixels = setting.resolution**2
    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "latentae": latentae.__version__,
        "model": {
            "path": str(source.path),
            "kind": source.kind,
            "fingerprint": source.fingerprint,
            "weights": source.weights_file.name,
            "parameters": parameters,
            "downsampling": source.config.downsampling,
        },
        "data": {
            "shards": [entry.name for entry in index.shards],
            "digest": index.digest,
            "images": len(measurement.keys),
            "available": index.samples,
            "resolution": setting.resolution,
        },
        "metrics": measurement.scores[MODEL].summary(seed),
        "perceptual": {"name": setting.distance.name, "reason": setting.distance.reason},
        "latent": {
            "shape": [z, height, width],
            "floats_per_pixel": z * height * width / pixels,
            "image_numbers_per_latent_number": 3 * pixels / (z * height * width),
            **measurement.latents.result(),
        },
        "baselines": {
            QUANTISED: _quantised(setting, measurement),
            JPEG: _jpeg(setting, measurement),
            PCA: _pca(setting, measurement, pca),
        },
        "conventions": _conventions(setting),
        "environment": _environment(setting.device),
    }
    result["findings"] = [*_comparisons(result), *_omissions(result, setting.distance), *_overlap(setting)]
    return result


def _quantised(setting: Setting, measurement: Measurement) -> dict[str, Any]:
    scores = measurement.scores[QUANTISED]
    size = scores.mean("bytes") or 0.0
    return {
        "label": "this model, 8-bit latents",
        "metrics": scores.summary(setting.seed),
        "bytes_per_image": size,
        "bits_per_pixel": 8 * size / setting.resolution**2,
    }


def _jpeg(setting: Setting, measurement: Measurement) -> dict[str, Any]:
    scores, quantised = measurement.scores[JPEG], measurement.scores[QUANTISED]
    jpeg: dict[str, Any] = {"label": "JPEG in the same bytes"}
    left_out = sum(math.isnan(value) for value in scores.values["bytes"])
    if left_out == len(measurement.keys):
        return jpeg | {
            "missing": f"even at quality 1 every file is larger than its budget, {quantised.mean('bytes'):.0f} bytes on average"
        }
    return jpeg | {
        "metrics": scores.summary(setting.seed),
        "bytes_per_image": scores.mean("bytes"),
        "quality": scores.mean("quality"),
        "left_out": left_out,
        "paired": paired(quantised, scores, setting.seed),
    }


def _pca(setting: Setting, measurement: Measurement, pca: PatchPCA | str) -> dict[str, Any]:
    label = {"label": "PCA with as many floats"}
    if isinstance(pca, str):
        return label | {"missing": pca}
    return label | {
        "metrics": measurement.scores[PCA].summary(setting.seed),
        "components": pca.basis.shape[1],
        "patch": pca.patch,
        "patches": pca.patches,
        "paired": paired(measurement.scores[MODEL], measurement.scores[PCA], setting.seed),
    }


def _comparisons(result: dict[str, Any]) -> list[dict[str, str]]:
    """Who wins against each baseline, PCA before JPEG."""
    found = []
    for method, model in ((PCA, "this model"), (JPEG, "this model with 8-bit latents")):
        baseline = result["baselines"][method]
        for metric in ("psnr", "perceptual"):
            if metric in baseline.get("paired", {}):
                name = metric_label(metric, result, arrow=False)
                found.append(finding(metric, name, baseline["paired"][metric], model, baseline["label"]))
    return found


def _omissions(result: dict[str, Any], distance: Distance) -> list[dict[str, str]]:
    """What was not measured, and why."""
    baselines, images = result["baselines"], result["data"]["images"]
    texts = [
        f"{baseline['label']}: not measured; {baseline['missing']}." for baseline in baselines.values() if "missing" in baseline
    ]
    left_out, label = baselines[JPEG].get("left_out"), baselines[JPEG]["label"]
    if left_out:
        texts.append(f"{label}: {left_out} of {images} images do not fit even at quality 1; its numbers leave them out.")
    if distance.module is None:
        texts.append(f"Perceptual distance: not measured; {distance.reason}.")
    if images == 1:
        texts.append("One image has no interval: its bounds are the value itself.")
    return [{"kind": "note", "text": text} for text in texts]


def _overlap(setting: Setting) -> list[dict[str, str]]:
    """Say so when the images evaluated are among those that the model was trained on or PCA was fitted on."""
    evaluated = {Path(entry.path).resolve() for entry in setting.index.shards}
    trained = setting.training.index.shards if setting.training.index else ()
    shared = len(evaluated & {Path(entry.path).resolve() for entry in trained})
    if not shared:
        return []
    text = f"{shared} of the {len(evaluated)} shards evaluated are training shards too: images not seen in training may do worse."
    return [{"kind": "bad", "text": text}]


def _conventions(setting: Setting) -> dict[str, str]:
    """How every number was computed; they move the numbers, so every report states them."""
    size, distance = setting.resolution, setting.distance
    perceptual = f"none; {distance.reason}"
    if distance.name:
        perceptual = (
            f"{distance.name}, on the uint8 images scaled to [-1, 1]; one that was also a training loss flatters the model"
        )
    return {
        "images": f"RGB, short side resized to {size} px (antialiased bicubic), centre crop to {size} x {size}",
        "latent": "posterior mean, fp32, not scaled",
        "reconstruction": "rounded and clamped to uint8 before any metric",
        "PSNR": "10 log10(255² / MSE) of each image, then averaged; identical images are infinite: counted, not averaged",
        "SSIM": "on [0, 255], 11-tap Gaussian window (sigma 1.5) inside the image, population covariance, mean of channels",
        "perceptual distance": perceptual,
        "interval": f"95 %, percentile bootstrap over images, 2000 resamples, seed {setting.seed}; comparisons paired by image",
        "latent bytes": "8 bits between minimum and maximum of each image and channel, deflate level 9; ranges counted",
        "JPEG": "highest quality whose whole file fits the bytes of the image's own latent; 4:4:4 or 4:2:0, whichever is nearer",
        "PCA": f"patches as large as a latent pixel, z components; about {PCA_IMAGES} training images; floats not quantised",
        "latent statistics": "of posterior samples, by the law of total variance; scaling_factor = 1 / std over all elements",
    }


def _environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, which can move the last digits."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "latentae": latentae.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": platform.system(),
        "device": f"{device.type} ({name})",
    }

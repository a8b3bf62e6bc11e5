"""From a measurement to what metrics.json holds: summaries, baselines, findings and the conventions they rest on."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import latentae
from latentae.evaluation.measure import MODEL, QUANTISED
from latentae.evaluation.measurement import Measurement
from latentae.evaluation.methods.dct import Dct
from latentae.evaluation.methods.jpeg import Jpeg
from latentae.evaluation.methods.pca import Pca
from latentae.evaluation.methods.webp import WebP
from latentae.evaluation.setting import DCT, JPEG, PCA, PCA_IMAGES, WEBP, Setting
from latentae.evaluation.showing import Shown
from latentae.measures.extractors import Extractor
from latentae.measures.scores import finding, metric_label, paired
from latentae.models.pretrained import ModelSource

__all__ = ["FORMAT_VERSION", "summarise"]

FORMAT_VERSION = 2
NOT_ASKED = "not asked for"
LISTED = 20  # images that could not be read; the others are counted
LABELS = {PCA: Pca.label, DCT: Dct.label, JPEG: Jpeg.label, WEBP: WebP.label}


def summarise(setting: Setting, measurement: Measurement, shown: Shown) -> dict[str, Any]:
    """Everything as plain JSON values.

    Args:
        setting: what was evaluated and how.
        measurement: what the pass over the images gave.
        shown: what the second look gave; its examples are not among the values.
    """
    z, height, width = measurement.latent_shape
    pixels = setting.resolution**2
    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "latentae": latentae.__version__,
        "model": _model(setting.source, sum(parameter.numel() for parameter in setting.model.parameters())),
        "data": _data(setting, measurement),
        "metrics": measurement.scores[MODEL].summary(setting.seed),
        "perceptual": {"name": setting.distance.name, "reason": setting.distance.reason},
        "frechet": _frechet(setting, measurement),
        "latent": {
            "shape": [z, height, width],
            "floats_per_pixel": z * height * width / pixels,
            "image_numbers_per_latent_number": setting.channels * pixels / (z * height * width),
            **measurement.latents.result(),
            "probe": measurement.probe,
        },
        "baselines": {
            QUANTISED: _quantised(setting, measurement),
            **{name: _baseline(setting, measurement, name) for name in (PCA, DCT, JPEG, WEBP)},
        },
        "compared": list(_compared(setting, measurement)),
        "diagnostics": _diagnostics(shown),
        "rate_distortion": shown.rate_distortion or {"missing": NOT_ASKED},
        "conventions": _conventions(setting),
        "environment": _environment(setting.device),
    }
    if shown.diffusability is not None:
        result["diffusability"] = shown.diffusability
    result["findings"] = [
        *_comparisons(result),
        *_omissions(result, setting),
        *_images(result["data"]),
        *_overlap(setting),
    ]
    return result


def _model(source: ModelSource, parameters: int) -> dict[str, Any]:
    return {
        "path": str(source.path),
        "kind": source.kind,
        "fingerprint": source.fingerprint,
        "weights": source.weights_file.name,
        "parameters": parameters,
        "downsampling": source.config.downsampling,
    }


def _data(setting: Setting, measurement: Measurement) -> dict[str, Any]:
    index, counts = setting.index, measurement.counts
    return {
        "shards": [entry.name for entry in index.shards],
        "digest": index.digest,
        "images": len(measurement.keys),
        "available": index.samples,
        "resolution": setting.resolution,
        "channels": setting.channels,
        "skipped": [{"key": key, "reason": reason} for key, reason in measurement.skipped[:LISTED]],
        "skipped_count": len(measurement.skipped),
        "enlarged": counts["enlarged"],
        "gray": counts["gray"],
        "sixteen_bit": counts["deep"],
    }


def _frechet(setting: Setting, measurement: Measurement) -> dict[str, Any]:
    if not isinstance(setting.extractor, Extractor):
        return {"missing": setting.extractor}
    if len(measurement.keys) < 2:
        return {"missing": "one image has no spread"}
    return {
        "name": setting.extractor.name,
        "convention": setting.extractor.convention,
        "images": len(measurement.keys),
        "floor": None if measurement.originals is None else measurement.originals.floor(),
        "values": measurement.frechet(),
    }


def _quantised(setting: Setting, measurement: Measurement) -> dict[str, Any]:
    scores = measurement.scores[QUANTISED]
    size = scores.mean("bytes") or 0.0
    return {
        "label": "this model, 8-bit latents",
        "metrics": scores.summary(setting.seed),
        "bytes_per_image": size,
        "bits_per_pixel": 8 * size / setting.resolution**2,
    }


def _baseline(setting: Setting, measurement: Measurement, name: str) -> dict[str, Any]:
    """One baseline, and how the model does against it: codecs meet the model with 8-bit latents, for they take its bytes."""
    baseline: dict[str, Any] = {"label": LABELS[name]}
    if name in setting.missing:
        return baseline | {"missing": setting.missing[name]}
    scores, images = measurement.scores[name], len(measurement.keys)
    left_out = sum(math.isnan(value) for value in scores.values["psnr"])
    if left_out == images:
        budget = measurement.scores[QUANTISED].mean("bytes")
        return baseline | {
            "missing": f"even at the lowest quality every file is larger than its budget, {budget:.0f} bytes on average"
        }
    rival = MODEL if name in (PCA, DCT) else QUANTISED
    extra = {"bytes_per_image": scores.mean("bytes"), "quality": scores.mean("quality"), "left_out": left_out}
    pca, dct = setting.bases
    basis = {PCA: pca, DCT: dct}.get(name)
    if basis is not None:
        extra = {"components": setting.source.config.latent_channels, "patch": basis.patch}
    if name == PCA and pca is not None:
        extra["patches"] = pca.patches
    return baseline | {
        "metrics": scores.summary(setting.seed),
        **extra,
        "paired": paired(measurement.scores[rival], scores, setting.seed),
    }


def _compared(setting: Setting, measurement: Measurement) -> Iterator[dict[str, Any]]:
    pixels = setting.resolution**2
    for other in setting.compared:
        scores, config = measurement.scores[other.name], other.source.config
        side = setting.resolution // config.downsampling
        about = {
            "name": other.name,
            "label": other.label,
            **_model(other.source, sum(parameter.numel() for parameter in other.model.parameters())),
            "latent": {
                "shape": [config.latent_channels, side, side],
                "floats_per_pixel": config.latent_channels * side**2 / pixels,
            },
        }
        left_out = sum(math.isnan(value) for value in scores.values["psnr"])
        if left_out == len(measurement.keys):
            yield {**about, "missing": "every reconstruction has NaN or infinite values"}
            continue
        size = scores.mean("bytes")
        yield {
            **about,
            "metrics": scores.summary(setting.seed),
            "bytes_per_image": size,
            "bits_per_pixel": None if size is None else 8 * size / pixels,
            "left_out": left_out,
            "paired": paired(measurement.scores[MODEL], scores, setting.seed),
        }


def _diagnostics(shown: Shown) -> dict[str, Any]:
    if shown.diagnosis is None:
        return {"missing": NOT_ASKED}
    found = dict(shown.diagnosis.result)
    file = next((name for name in shown.pictures if "interpolation" in name), None)
    if file is not None:
        found["interpolation"] = {**found["interpolation"], "file": file}
    return found


def _comparisons(result: dict[str, Any]) -> list[dict[str, str]]:
    """Who wins against each baseline and model, at equal floats before equal bytes."""
    rivals = [(result["baselines"][name], "this model") for name in (PCA, DCT)]
    rivals += [(other, "this model") for other in result["compared"]]
    rivals += [(result["baselines"][name], "this model with 8-bit latents") for name in (JPEG, WEBP)]
    found = []
    for rival, model in rivals:
        for metric in ("psnr", "perceptual"):
            if metric in rival.get("paired", {}):
                name = metric_label(metric, result, arrow=False)
                found.append(finding(metric, name, rival["paired"][metric], model, rival["label"]))
    return found


def _omissions(result: dict[str, Any], setting: Setting) -> list[dict[str, str]]:
    """What was not measured, and why."""
    images, rivals = result["data"]["images"], [*result["baselines"].values(), *result["compared"]]
    texts = [f"{rival['label']}: not measured; {rival['missing']}." for rival in rivals if "missing" in rival]
    texts += [
        f"{rival['label']}: {rival['left_out']} of {images} images have no result, and its numbers leave them out."
        for rival in rivals
        if rival.get("left_out")
    ]
    if setting.distance.module is None:
        texts.append(f"Perceptual distance: not measured; {setting.distance.reason}.")
    if "missing" in result["frechet"]:
        texts.append(f"Frechet distance: not measured; {result['frechet']['missing']}.")
    if images == 1:
        texts.append("One image has no interval: its bounds are the value itself.")
    return [{"kind": "note", "text": text} for text in texts]


def _images(data: dict[str, Any]) -> list[dict[str, str]]:
    """What is unusual about the images, and what was done about it."""
    found = []
    if data["skipped_count"]:
        first = data["skipped"][0]
        text = f"{_count(data['skipped_count'])} could not be read and count for nothing; the first: {first['reason']}."
        found.append({"kind": "bad", "text": text})
    size = data["resolution"]
    notes = [
        (
            data["enlarged"],
            f"smaller than {size} pixels, enlarged: numbers of such images say little about detail.",
        ),
        (data["gray"] if data["channels"] != 1 else 0, "stored as gray, evaluated with equal channels."),
        (data["sixteen_bit"], "stored with more than 8 bits, rounded to 8 as every metric here is."),
    ]
    return found + [{"kind": "note", "text": f"{_count(number)} {text}"} for number, text in notes if number]


def _count(number: int) -> str:
    return f"{number:,} image{'s' if number != 1 else ''}"


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
    kind = {1: "gray (BT.601 luma)", 3: "RGB", 4: "RGBA"}[setting.channels]
    perceptual = f"none; {distance.reason}"
    if distance.name:
        perceptual = f"{distance.name}, on the uint8 images as RGB scaled to [-1, 1]; one that was also a training loss flatters the model"
    frechet = f"none; {setting.extractor}"
    if isinstance(setting.extractor, Extractor):
        frechet = (
            f"{setting.extractor.name}: {setting.extractor.convention}; all images as one set, no interval (resampling repeats images, "
            "which moves the distance itself); few images give larger values: compare at equal numbers, and with the floor"
        )
    return {
        "images": f"{kind}, short side resized to {size} px (antialiased bicubic), centre crop to {size} x {size}",
        "latent": "posterior mean, fp32, not scaled",
        "reconstruction": "rounded and clamped to uint8 before any metric",
        "PSNR": "10 log10(255² / MSE) of each image, then averaged; identical images are infinite: counted, not averaged",
        "SSIM": "on [0, 255], 11-tap Gaussian window (sigma 1.5) inside the image, population covariance, mean of channels",
        "perceptual distance": perceptual,
        "Frechet distance": frechet,
        "interval": f"95 %, percentile bootstrap over images, 2000 resamples, seed {setting.seed}; comparisons paired by image",
        "latent bytes": "8 bits between minimum and maximum of each image and channel, deflate level 9; ranges counted",
        "JPEG, WebP": "highest quality whose whole file fits the bytes of the image's own latent; JPEG 4:4:4 or 4:2:0, whichever is nearer",
        "PCA, DCT": f"patches as large as a latent pixel, z components; about {PCA_IMAGES} training images; floats not quantised",
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

"""The content of metrics.json: summaries, baselines, findings and conventions."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from latentae.evaluation.details import Details
from latentae.evaluation.loaded_inputs import BASELINES, PCA_IMAGES, LoadedInputs, LoadedModel
from latentae.evaluation.measurement import MODEL, QUANTIZED, Measurement
from latentae.measures.frechet import Extractor, noise_floor
from latentae.measures.scores import finding, metric_label, paired
from latentae.version import __version__

__all__ = ["FORMAT_VERSION", "summarize"]

FORMAT_VERSION = 2
MOST_SKIPPED = 20  # unreadable images that are listed
NOT_REQUESTED = {"missing": "not asked for"}


def summarize(inputs: LoadedInputs, measurement: Measurement, details: Details) -> dict[str, Any]:
    """Everything as plain JSON values, except the examples of `details`."""
    z, height, width = measurement.latent_shape
    pixels = inputs.resolution**2
    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "latentae": __version__,
        "model": _model(inputs.models[0]),
        "data": _data(inputs, measurement),
        "metrics": measurement.scores[MODEL].summary(inputs.options.seed),
        "perceptual": {"name": inputs.distance.name, "reason": inputs.distance.reason},
        "frechet": _frechet(inputs, measurement),
        "latent": {
            "shape": [z, height, width],
            "floats_per_pixel": z * height * width / pixels,
            "image_numbers_per_latent_number": inputs.channels * pixels / (z * height * width),
            **measurement.latents.result(),
            "probe": measurement.probe(),
        },
        "baselines": {
            QUANTIZED: _quantized(inputs, measurement),
            **{name: _baseline(inputs, measurement, name) for name in BASELINES},
        },
        "compared": list(_compared(inputs, measurement)),
        "diagnostics": details.diagnostics or NOT_REQUESTED,
        "rate_distortion": details.rate_distortion or NOT_REQUESTED,
        "conventions": _conventions(inputs),
        "environment": _environment(inputs.device),
    }
    if details.diffusability is not None:
        result["diffusability"] = details.diffusability
    result["findings"] = [
        *_comparisons(result),
        *_omissions(inputs, result),
        *_unusual_images(result["data"]),
        *_overlap(inputs),
    ]
    return result


def _model(loaded: LoadedModel) -> dict[str, Any]:
    source = loaded.source
    return {
        "path": str(source.path),
        "kind": source.kind,
        "fingerprint": source.fingerprint,
        "weights": source.weights_file.name,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "downsampling": source.config.downsampling,
    }


def _data(inputs: LoadedInputs, measurement: Measurement) -> dict[str, Any]:
    index, counts, skipped = inputs.index, measurement.counts, measurement.skipped
    return {
        "shards": [entry.name for entry in index.shards],
        "digest": index.digest,
        "images": len(measurement.keys),
        "available": index.samples,
        "resolution": inputs.resolution,
        "channels": inputs.channels,
        "skipped": [{"key": key, "reason": reason} for key, reason in skipped[:MOST_SKIPPED]],
        "skipped_count": len(skipped),
        "enlarged": counts["enlarged"],
        "gray": counts["gray"],
        "sixteen_bit": counts["deep"],
    }


def _frechet(inputs: LoadedInputs, measurement: Measurement) -> dict[str, Any]:
    if not isinstance(inputs.extractor, Extractor):
        return {"missing": inputs.extractor}
    if len(measurement.keys) < 2:
        return {"missing": "one image has no spread"}
    return {
        "name": inputs.extractor.name,
        "convention": inputs.extractor.convention,
        "images": len(measurement.keys),
        "floor": None if measurement.halves is None else noise_floor(measurement.halves),
        "values": measurement.frechet(),
    }


def _quantized(inputs: LoadedInputs, measurement: Measurement) -> dict[str, Any]:
    scores = measurement.scores[QUANTIZED]
    size = scores.mean("bytes") or 0.0
    return {
        "label": "this model, 8-bit latents",
        "metrics": scores.summary(inputs.options.seed),
        "bytes_per_image": size,
        "bits_per_pixel": 8 * size / inputs.resolution**2,
    }


def _baseline(inputs: LoadedInputs, measurement: Measurement, name: str) -> dict[str, Any]:
    """One baseline, paired with the model; codecs are paired with 8-bit latents of equal bytes."""
    baseline: dict[str, Any] = {"label": BASELINES[name]}
    if name in inputs.missing:
        return baseline | {"missing": inputs.missing[name]}
    scores, quantized = measurement.scores[name], measurement.scores[QUANTIZED]
    left_out = _left_out(measurement, name)
    if left_out == len(measurement.keys):
        budget = quantized.mean("bytes")
        reason = "even at the lowest quality every file is larger than its budget"
        return baseline | {"missing": f"{reason}, {budget:.0f} bytes on average"}
    pca, dct = inputs.bases
    basis = {"pca": pca, "dct": dct}.get(name)
    if basis is None:
        rival = quantized
        facts = {
            "bytes_per_image": scores.mean("bytes"),
            "quality": scores.mean("quality"),
            "left_out": left_out,
        }
    else:
        rival = measurement.scores[MODEL]
        facts = {"components": inputs.source.config.latent_channels, "patch": basis.patch}
        facts |= {"patches": basis.patches} if name == "pca" else {}
    pairs = paired(rival, scores, inputs.options.seed)
    return baseline | {"metrics": scores.summary(inputs.options.seed), **facts, "paired": pairs}


def _left_out(measurement: Measurement, name: str) -> int:
    """Number of images without a result."""
    return sum(map(math.isnan, measurement.scores[name].values["psnr"]))


def _compared(inputs: LoadedInputs, measurement: Measurement) -> Iterator[dict[str, Any]]:
    seed, pixels = inputs.options.seed, inputs.resolution**2
    for other in inputs.compared:
        scores, z = measurement.scores[other.name], other.source.config.latent_channels
        side = inputs.resolution // other.source.config.downsampling
        about = {
            "name": other.name,
            "label": other.label,
            **_model(other),
            "latent": {"shape": [z, side, side], "floats_per_pixel": z * side**2 / pixels},
        }
        left_out = _left_out(measurement, other.name)
        if left_out == len(measurement.keys):
            yield {**about, "missing": "every reconstruction has NaN or infinite values"}
            continue
        size = scores.mean("bytes")
        yield {
            **about,
            "metrics": scores.summary(seed),
            "bytes_per_image": size,
            "bits_per_pixel": None if size is None else 8 * size / pixels,
            "left_out": left_out,
            "paired": paired(measurement.scores[MODEL], scores, seed),
        }


def _comparisons(result: dict[str, Any]) -> list[dict[str, str]]:
    """Who wins against each baseline and model: first at equal floats, then at equal bytes."""
    pca, dct, *codecs = (result["baselines"][name] for name in BASELINES)
    rivals = [(rival, "this model") for rival in (pca, dct, *result["compared"])]
    rivals += [(rival, "this model with 8-bit latents") for rival in codecs]
    found = []
    for rival, model in rivals:
        for metric in ("psnr", "perceptual"):
            if metric in rival.get("paired", {}):
                name = metric_label(metric, result, arrow=False)
                found.append(finding(metric, name, rival["paired"][metric], model, rival["label"]))
    return found


def _omissions(inputs: LoadedInputs, result: dict[str, Any]) -> list[dict[str, str]]:
    """Everything that was not measured, and why."""
    images, rivals = result["data"]["images"], [*result["baselines"].values(), *result["compared"]]
    texts = [f"{rival['label']}: not measured; {rival['missing']}." for rival in rivals if "missing" in rival]
    texts += [
        f"{rival['label']}: {rival['left_out']} of {images} images have no result, and its numbers leave "
        "them out."
        for rival in rivals
        if rival.get("left_out")
    ]
    if inputs.distance.module is None:
        texts.append(f"Perceptual distance: not measured; {inputs.distance.reason}.")
    if "missing" in result["frechet"]:
        texts.append(f"Frechet distance: not measured; {result['frechet']['missing']}.")
    if images == 1:
        texts.append("One image has no interval: its bounds are the value itself.")
    return [{"kind": "note", "text": text} for text in texts]


def _unusual_images(data: dict[str, Any]) -> list[dict[str, str]]:
    """Images that were skipped, enlarged or converted."""
    found = []
    if data["skipped_count"]:
        first = data["skipped"][0]
        text = f"{_count(data['skipped_count'])} could not be read and count for nothing"
        text += f"; the first: {first['reason']}."
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


def _overlap(inputs: LoadedInputs) -> list[dict[str, str]]:
    """Warn if shards are both evaluated and used for training or for fitting PCA."""
    evaluated = {Path(entry.path).resolve() for entry in inputs.index.shards}
    trained = inputs.training.index.shards if inputs.training.index else ()
    shared = len(evaluated & {Path(entry.path).resolve() for entry in trained})
    if not shared:
        return []
    text = (
        f"{shared} of the {len(evaluated)} shards evaluated are training shards too: "
        "images not seen in training may do worse."
    )
    return [{"kind": "bad", "text": text}]


def _conventions(inputs: LoadedInputs) -> dict[str, str]:
    """How every number was computed."""
    size, distance = inputs.resolution, inputs.distance
    kind = {1: "gray (BT.601 luma)", 3: "RGB", 4: "RGBA"}[inputs.channels]
    perceptual = f"none; {distance.reason}"
    if distance.name:
        perceptual = (
            f"{distance.name}, on the uint8 images as RGB scaled to [-1, 1]; "
            "one that was also a training loss flatters the model"
        )
    frechet = f"none; {inputs.extractor}"
    if isinstance(inputs.extractor, Extractor):
        frechet = (
            f"{inputs.extractor.name}: {inputs.extractor.convention}; all images as one set, no interval "
            "(resampling repeats images, which moves the distance itself); "
            "few images give larger values: compare at equal numbers, and with the floor"
        )
    return {
        "images": f"{kind}, short side resized to {size} px (antialiased bicubic), "
        f"centre crop to {size} x {size}",
        "latent": "posterior mean, fp32, not scaled",
        "reconstruction": "rounded and clamped to uint8 before any metric",
        "PSNR": "10 log10(255² / MSE) of each image, then averaged; "
        "identical images are infinite: counted, not averaged",
        "SSIM": "on [0, 255], 11-tap Gaussian window (sigma 1.5) inside the image, "
        "population covariance, mean of channels",
        "perceptual distance": perceptual,
        "Frechet distance": frechet,
        "interval": "95 %, percentile bootstrap over images, 2000 resamples, "
        f"seed {inputs.options.seed}; comparisons paired by image",
        "latent bytes": "8 bits between minimum and maximum of each image and channel, "
        "deflate level 9; ranges counted",
        "JPEG, WebP": "highest quality whose whole file fits the bytes of the image's own latent; "
        "JPEG 4:4:4 or 4:2:0, whichever is nearer",
        "PCA, DCT": f"patches as large as a latent pixel, z components; about {PCA_IMAGES} "
        "training images; floats not quantised",
        "latent statistics": "of posterior samples, by the law of total variance; "
        "scaling_factor = 1 / std over all elements",
    }


def _environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, which can change the last digits."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "latentae": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": platform.system(),
        "device": f"{device.type} ({name})",
    }

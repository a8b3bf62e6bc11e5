"""Results of an evaluation with every item of a page, and with every item missing."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.pages.images import error_map, image_grid, write_png

METRICS = {"psnr": 27.3, "ssim": 0.84, "perceptual": 0.113}
LABELS = {
    "latent_8bit": "this model, 8-bit latents",
    "pca": "PCA with as many floats",
    "dct": "block DCT with as many floats",
    "jpeg": "JPEG in the same bytes",
    "webp": "WebP in the same bytes",
}


def photo(seed: int, size: int = 96) -> Tensor:
    """uint8 [3, size, size]: colours that flow, with a few edges."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)[
        0
    ]
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    disc = ((x - size * 0.6) ** 2 + (y - size * 0.4) ** 2 < (size * (0.15 + 0.02 * seed)) ** 2).float()
    return ((0.75 * smooth + 0.25 * disc).clamp(0, 1) * 255).round().to(torch.uint8)


def worse(image: Tensor, sigma: float, seed: int = 0) -> Tensor:
    """The image, blurred and with noise of `sigma` levels."""
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed)) * sigma
    soft = torch.nn.functional.avg_pool2d(image.float()[None], 5, 1, 2, count_include_pad=False)[0]
    return (soft + noise).clamp(0, 255).round().to(torch.uint8)


def interval(mean: float, spread: float = 0.04, n: int = 300) -> dict[str, Any]:
    return {"mean": mean, "low": mean * (1 - spread), "high": mean * (1 + spread), "n": n, "infinite": 0}


def metrics(factor: float) -> dict[str, Any]:
    return {
        name: interval(value * (2 - factor if name == "perceptual" else factor))
        for name, value in METRICS.items()
    }


def paired(mean: float) -> dict[str, Any]:
    return {"psnr": {"better": "model" if mean > 0 else "baseline", **interval(mean)}}


def latent(channels: int) -> dict[str, Any]:
    return {
        "shape": [channels, 32, 32],
        "floats_per_pixel": channels / 64,
        "image_numbers_per_latent_number": 192 / channels,
        "channel_mean": [math.sin(c) for c in range(channels)],
        "channel_std": [1.2 + 0.5 * math.cos(c) for c in range(channels)],
        "channel_posterior_std": [0.05 + 0.01 * math.cos(c) for c in range(channels)],
        "channel_mean_variance": [1.4 ** -(c % 9) for c in range(channels)],
        "kl_nats_per_channel": [900 / (1 + c) for c in range(channels)],
        "active_units": channels - 1,
        "effective_rank": 0.8 * channels,
        "probe": {
            "classes": 3,
            "features": 5 * channels,
            "tested_on": 60,
            "accuracy": 0.71,
            "training_accuracy": 0.83,
            "most_frequent_class": 0.4,
            "by_class": {"cat": 0.8, "coffee": 0.7, "temple": 0.6},
        },
        "scaling_factor": 0.7687,
    }


def baseline(name: str, factor: float, **rest: Any) -> dict[str, Any]:
    return {"label": LABELS[name], "metrics": metrics(factor), **rest}


def full_result(measured: dict[str, Any], channels: int = 8) -> dict[str, Any]:
    """A small evaluation with every item of metrics.json but the pictures."""
    result, other = (
        copy.deepcopy(measured),
        {"path": "runs/kl-f8", "kind": "diffusers", "parameters": 83_653_863},
    )
    result["data"] |= {"images": 300, "available": 312, "enlarged": 3, "gray": 1, "sixteen_bit": 2}
    result["data"] |= {"skipped": [{"key": "cat/007", "reason": "the file ends early"}], "skipped_count": 12}
    result["metrics"] = metrics(1.0)
    result["perceptual"] = {"name": "LPIPS (alex)", "reason": "asked for"}
    result["frechet"] = {
        "name": "FD-efficientnet-lite0",
        "images": 300,
        "floor": 0.41,
        "values": {
            "model": 3.2,
            "latent_8bit": 3.25,
            "kl-f8": 1.94,
            "pca": 8.1,
            "dct": 9.4,
            "jpeg": 5.5,
            "webp": 4.4,
        },
    }
    result["latent"] |= latent(channels)
    result["latent"]["spectrum"]["high_frequency_share"] = {"latent": 0.31, "image": 0.08}
    result["baselines"] = {
        "latent_8bit": baseline("latent_8bit", 0.99, bytes_per_image=7312.0, bits_per_pixel=0.89),
        "pca": baseline("pca", 0.95, components=8, patch=8, patches=157696, paired=paired(1.2)),
        "dct": baseline("dct", 0.92, components=8, patch=8, paired=paired(2.2)),
        "jpeg": baseline("jpeg", 1.06, bytes_per_image=7101.0, quality=71.3, left_out=2, paired=paired(-1.6)),
        "webp": baseline("webp", 1.12, bytes_per_image=7003.0, quality=77.0, paired=paired(-3.2)),
    }
    compared = {
        "latent": {"shape": [4, 32, 32], "floats_per_pixel": 0.0625},
        "metrics": metrics(1.04),
        "bytes_per_image": 3702.0,
        "bits_per_pixel": 0.45,
        "paired": paired(-1.1),
    }
    broken = {"latent": None, "missing": "every reconstruction has infinite values"}
    result["compared"] = [
        {"name": name, "label": name, **other, **rest}
        for name, rest in (("kl-f8", compared), ("broken", broken))
    ]
    diagnostics = result["diagnostics"]
    diagnostics["equivariance"][0] = {
        "transform": "scale 0.25",
        "missing": "32 x 32 latents are too small for it",
    }
    diagnostics["equivariance"][-1] = {
        "transform": "rotation 90",
        "encoder_error": 0.73,
        "decoder_psnr": 19.3,
    }
    diagnostics["half"]["runs"]["fp16"]["image_psnr"] = 68.2
    del diagnostics["interpolation"]["file"]
    result["diffusability"] = {
        "extractor": "FD-efficientnet-lite0",
        "images": 300,
        "interpolated": {"frechet": 6.1, "neighbours": 10, "from": "training images"},
        "flow": {
            "parameters": 1_842_112,
            "steps": 1500,
            "batch": 64,
            "seeds": [0, 1, 2],
            "frechet": {"mean": 21.3, "std": 0.8, "values": [20.4, 21.3, 22.2]},
            "loss": {"values": [0.81, 0.8, 0.82]},
        },
        "limits": "A ranking aid: a small network, trained briefly, on few images.",
    }
    texts = {
        "good": "This model beats PCA.",
        "bad": "JPEG beats this model.",
        "note": "2 images were rounded to 8 bits.",
    }
    result["findings"] = [{"kind": kind, "text": text} for kind, text in texts.items()] * 3
    result["examples"] = []
    return result


def add_pictures(folder: Path, result: dict[str, Any], size: int = 96) -> dict[str, Any]:
    """Write the pictures of a result and name them in it."""
    compared = [item["name"] for item in result["compared"] if "missing" not in item]
    for number, kind in enumerate(["spread"] * 4 + ["worst"] * 3 + ["best"] * 3):
        original = photo(number, size)
        made = {
            name: worse(original, 4.0 + 3 * place, place)
            for place, name in enumerate(["model", *compared, "pca", "dct", "jpeg", "webp"])
        }
        images = {"original": original, **made, "heat": error_map(original, made["model"])}
        files = {}
        for name, image in images.items():
            files[name] = f"examples/{number}-{name}.png"
            write_png(folder / files[name], image)
        psnr = {name: 21.3 + place for place, name in enumerate(made)}
        result["examples"].append({"kind": kind, "key": f"photos/{number:04}", "files": files, "psnr": psnr})
    strip = torch.cat([worse(photo(step, 64), 2.0) for step in range(9)], dim=2)
    grid = image_grid([[photo(row * 8 + column, 48) for column in range(8)] for row in range(3)], columns=8)
    for name, image in {"interpolation": strip, "flow": grid, "between": grid}.items():
        write_png(folder / f"examples/{name}.png", image)
    result["diagnostics"]["interpolation"]["file"] = "examples/interpolation.png"
    result["diffusability"]["files"] = {
        "samples": "examples/flow.png",
        "interpolated": "examples/between.png",
    }
    return result


def missing_result(measured: dict[str, Any]) -> dict[str, Any]:
    """What is left where nothing could be measured but one constant image."""
    result = full_result(measured, 4)
    nothing = {"mean": None, "low": None, "high": None, "n": 0, "infinite": 1}
    result["metrics"] = {"psnr": nothing}
    result["perceptual"] = {"name": None, "reason": "no weights are on this machine"}
    result["frechet"] = {"missing": "one image has no spread"}
    for name, label in LABELS.items():
        result["baselines"][name] = {"label": label, "missing": "there is no training data"}
    result["baselines"]["latent_8bit"] = baseline("latent_8bit", 1.0, bytes_per_image=0.0, bits_per_pixel=0.0)
    result["baselines"]["latent_8bit"]["metrics"] = {"psnr": nothing}
    broken = {
        "name": "broken",
        "label": "broken",
        "path": "x",
        "missing": "every reconstruction has infinite values",
    }
    result["compared"] = [broken]
    constant = {
        "scaling_factor": None,
        "std": 0.0,
        "effective_rank": None,
        "spectrum": None,
        "active_units": 0,
    }
    result["latent"] |= constant | {"channel_mean_variance": [0.0] * 4, "kl_nats_per_channel": [0.0] * 4}
    result["latent"]["probe"] = {"skipped": "no image has a label"}
    reason = {"missing": "the model can't be traced"}
    result["diagnostics"] = {
        "images": 1,
        "equivariance": [{"transform": "rotation 90", "missing": "latents are not square"}],
        "sensitivity": [{"noise": 0.1, "psnr": None, "drop": None}],
        "half": reason,
        "interpolation": {"keys": ["a"], "steps": 9, "mode": "spherical", "missing": "it takes two images"},
    }
    result["rate_distortion"] = {"missing": "no image could be stored"}
    result["diffusability"] = {"missing": "there is no extractor"}
    result["findings"] = []
    return result

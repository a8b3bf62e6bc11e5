"""An evaluation with every item that a page can show, and one in which everything is missing; with the pictures that go with them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.evaluation.images import image_grid, write_png
from latentae.evaluation.page.heat import error_heat_map

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
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)[0]
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
    return {name: interval(value * (2 - factor if name == "perceptual" else factor)) for name, value in METRICS.items()}


def paired(mean: float) -> dict[str, Any]:
    return {"psnr": {"better": "model" if mean > 0 else "baseline", **interval(mean)}}


def latent(channels: int) -> dict[str, Any]:
    frequency = [0.02 + 0.04 * band for band in range(16)]
    falling = {"latent": [math.exp(-4 * f) for f in frequency], "image": [math.exp(-9 * f) for f in frequency]}
    return {
        "shape": [channels, 32, 32],
        "floats_per_pixel": channels / 64,
        "image_numbers_per_latent_number": 192 / channels,
        "channel_mean": [math.sin(c) for c in range(channels)],
        "channel_std": [1.2 + 0.5 * math.cos(c) for c in range(channels)],
        "channel_posterior_std": [0.05 + 0.01 * math.cos(c) for c in range(channels)],
        "channel_mean_variance": [1.4 ** -(c % 9) for c in range(channels)],
        "kl_nats_per_channel": [900 / (1 + c) for c in range(channels)],
        "mean": 0.02,
        "std": 1.3,
        "largest_absolute_mean": 4.77,
        "kl_nats_per_image": 4272.1,
        "active_units": channels - 1,
        "effective_rank": 0.8 * channels,
        "spectrum": {
            "frequency": frequency,
            **{name: [value / sum(row) for value in row] for name, row in falling.items()},
            "high_frequency_share": {"latent": 0.31, "image": 0.08},
        },
        "probe": {
            "method": "softmax regression",
            "classes": 3,
            "features": 5 * channels,
            "trained_on": 240,
            "tested_on": 60,
            "accuracy": 0.71,
            "training_accuracy": 0.83,
            "most_frequent_class": 0.4,
            "by_class": {"cat": 0.8, "coffee": 0.7, "temple": 0.6},
        },
        "scaling_factor": 0.7687,
        "shift_factor": 0.0185,
    }


def diagnostics() -> dict[str, Any]:
    stages = ["conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "conv_out"]
    run = {"finite": True, "latent_max_abs": 0.004, "image_max_abs": 0.011, "image_psnr": 68.2}
    return {
        "images": 32,
        "equivariance": [
            {"transform": "scale 0.25", "missing": "32 x 32 latents are too small for it"},
            {"transform": "scale 0.5", "encoder_error": 0.41, "decoder_psnr": 22.4},
            {"transform": "scale 0.75", "encoder_error": 0.22, "decoder_psnr": 24.1},
            {"transform": "rotation 90", "encoder_error": 0.73, "decoder_psnr": 19.3},
        ],
        "sensitivity": [
            {"noise": 0.1, "psnr": 26.9, "drop": 0.4},
            {"noise": 0.3, "psnr": 24.2, "drop": 3.1},
            {"noise": 1.0, "psnr": 17.8, "drop": 9.5},
        ],
        "half": {
            "images": 32,
            "half_images": 16,
            "force_upcast": False,
            "obstacle": None,
            "fp16_max": 65504.0,
            "margin": 4.0,
            "largest": {"coder": "decoder", "stage": "mid_block", "activation": 187.3},
            "activation_maxima": {
                coder: {stage: 3.0 ** (number + 1) for number, stage in enumerate(stages)} for coder in ("encoder", "decoder")
            },
            "runs": {"fp16": run, "bf16": {**run, "image_psnr": 51.7, "image_max_abs": 0.09, "latent_max_abs": 0.03}},
        },
        "interpolation": {"keys": ["cat/000", "coffee/001"], "steps": 9, "mode": "spherical"},
    }


def rate_distortion() -> dict[str, Any]:
    curves = [
        ("model", "this model", 3.2, 27.3),
        ("kl-f8", "kl-f8", 3.0, 28.4),
        ("pca", "PCA", 4.4, 26.8),
        ("dct", "block DCT", 4.3, 26.1),
        ("jpeg", "JPEG", 5.2, 30.0),
        ("webp", "WebP", 5.1, 31.5),
    ]

    def points(slope: float, top: float) -> list[dict[str, Any]]:
        return [
            {"bits_per_pixel": 0.05 * 1.9**step, "psnr": top - 9 + slope * step * 0.55, "setting": f"{step + 2}-bit"}
            for step in range(6)
        ]

    found = [{"name": name, "label": label, "points": points(slope, top)} for name, label, slope, top in curves]
    return {"images": 24, "curves": found, "left_out": []}


def baseline(name: str, factor: float, **rest: Any) -> dict[str, Any]:
    return {"label": LABELS[name], "metrics": metrics(factor), **rest}


def full_result(channels: int = 8) -> dict[str, Any]:
    """Every item of metrics.json but the pictures."""
    other = {"path": "runs/kl-f8", "kind": "diffusers", "parameters": 83_653_863}
    return {
        "format_version": 2,
        "latentae": "0.1.0",
        "model": {
            "path": "runs/tiny-f4",
            "kind": "run",
            "fingerprint": "b45729bdcd5e4dc1685e32d37773377462a2e98b07afe4d05b9275c9c5cf2d61",
            "weights": "ema.safetensors",
            "parameters": 655547,
            "downsampling": 8,
        },
        "data": {
            "shards": [f"{number:06}.tar" for number in range(6)],
            "digest": "4ada76dd0e770ec193675eedde9cfb85",
            "images": 300,
            "available": 312,
            "resolution": 256,
            "channels": 3,
            "skipped": [{"key": "cat/007", "reason": "the file ends early"}],
            "skipped_count": 12,
            "enlarged": 3,
            "gray": 1,
            "sixteen_bit": 2,
        },
        "metrics": metrics(1.0),
        "perceptual": {"name": "LPIPS (alex)", "reason": "asked for"},
        "frechet": {
            "name": "FD-efficientnet-lite0",
            "convention": "224 px",
            "images": 300,
            "floor": 0.41,
            "values": {"model": 3.2, "latent_8bit": 3.25, "kl-f8": 1.94, "pca": 8.1, "dct": 9.4, "jpeg": 5.5, "webp": 4.4},
        },
        "latent": latent(channels),
        "baselines": {
            "latent_8bit": baseline("latent_8bit", 0.99, bytes_per_image=7312.0, bits_per_pixel=0.89),
            "pca": baseline("pca", 0.95, components=8, patch=8, patches=157696, paired=paired(1.2)),
            "dct": baseline("dct", 0.92, components=8, patch=8, paired=paired(2.2)),
            "jpeg": baseline("jpeg", 1.06, bytes_per_image=7101.0, quality=71.3, left_out=2, paired=paired(-1.6)),
            "webp": baseline("webp", 1.12, bytes_per_image=7003.0, quality=77.0, paired=paired(-3.2)),
        },
        "compared": [
            {
                "name": "kl-f8",
                "label": "kl-f8",
                **other,
                "latent": {"shape": [4, 32, 32], "floats_per_pixel": 0.0625},
                "metrics": metrics(1.04),
                "bytes_per_image": 3702.0,
                "bits_per_pixel": 0.45,
                "paired": paired(-1.1),
            },
            {"name": "broken", "label": "broken", **other, "latent": None, "missing": "every reconstruction has infinite values"},
        ],
        "diagnostics": diagnostics(),
        "rate_distortion": rate_distortion(),
        "diffusability": {
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
        },
        "conventions": {
            "images": "RGB, short side resized to 256 px (antialiased bicubic), centre crop to 256 x 256",
            "PSNR": "10 log10(255² / MSE) of each image, then averaged",
        },
        "environment": {"latentae": "0.1.0", "torch": "2.15.0", "device": "cpu (x86_64)"},
        "findings": [
            {
                "kind": "good",
                "text": "PSNR: this model beats PCA with as many floats by 1.20 dB (paired 95 % interval 1.10 to 1.30).",
            },
            {"kind": "bad", "text": "PSNR: JPEG in the same bytes beats this model with 8-bit latents by 1.60 dB."},
            {"kind": "note", "text": "2 images are stored with more than 8 bits and were rounded to 8, as every metric here is."},
        ]
        * 3,
        "examples": [],
    }


def add_pictures(folder: Path, result: dict[str, Any], size: int = 96) -> dict[str, Any]:
    """Write the pictures of a result and name them in it."""
    compared = [item["name"] for item in result["compared"] if "missing" not in item]
    for number, kind in enumerate(["spread"] * 4 + ["worst"] * 3 + ["best"] * 3):
        original = photo(number, size)
        made = {
            name: worse(original, 4.0 + 3 * place, place)
            for place, name in enumerate(["model", *compared, "pca", "dct", "jpeg", "webp"])
        }
        images = {"original": original, **made, "heat": error_heat_map(original, made["model"])}
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
    result["diffusability"]["files"] = {"samples": "examples/flow.png", "interpolated": "examples/between.png"}
    return result


def missing_result() -> dict[str, Any]:
    """What is left where nothing could be measured but one constant image."""
    result = copy.deepcopy(full_result(4))
    nothing = {"mean": None, "low": None, "high": None, "n": 0, "infinite": 1}
    result["metrics"] = {"psnr": nothing}
    result["perceptual"] = {"name": None, "reason": "no weights are on this machine"}
    result["frechet"] = {"missing": "one image has no spread"}
    for name, label in LABELS.items():
        result["baselines"][name] = {"label": label, "missing": "there is no training data"}
    result["baselines"]["latent_8bit"] = baseline("latent_8bit", 1.0, bytes_per_image=0.0, bits_per_pixel=0.0)
    result["baselines"]["latent_8bit"]["metrics"] = {"psnr": nothing}
    broken = {"name": "broken", "label": "broken", "path": "x", "missing": "every reconstruction has infinite values"}
    result["compared"] = [broken]
    constant = {"scaling_factor": None, "std": 0.0, "effective_rank": None, "spectrum": None, "active_units": 0}
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

"""Pictures of an evaluation: images, what each method made of them, and where the model is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentae.pages.heat import BRIGHTEST, TICKS, heat_gradient
from latentae.pages.report import Gallery, GalleryRow, Picture, Scale, Section

__all__ = ["LARGEST", "example_row", "heat_scale", "picture_sections", "read_png", "shown"]

LARGEST = 512
"""Pixels of the longer side of a picture on a page, at most."""
PAGE_PIXELS = (
    5_000_000  # of all galleries of a page: PNGs of photos take some 2 bytes a pixel, base64 a third more
)
NAMES = {  # in the order shown; compared models come after the model
    "original": "original",
    "model": "this model",
    "heat": "error",
    "pca": "PCA, same floats",
    "dct": "block DCT, same floats",
    "jpeg": "JPEG, same bytes",
    "webp": "WebP, same bytes",
}
TITLES = {"spread": "Pictures", "worst": "The hardest images", "best": "The easiest images"}
CAPTIONS = {
    "spread": "Evenly spaced over the images, not picked. Under each picture its PSNR. PCA and block DCT keep as many numbers as "
    "the latent; JPEG and WebP take at most the bytes of the 8-bit latent.",
    "worst": "Where this model has its lowest PSNR.",
    "best": "Where this model has its highest PSNR.",
}


def picture_sections(folder: Path, result: Mapping[str, Any]) -> list[Section]:
    """Images spread over all, the hardest and the easiest; those of them that the evaluation has pictures of."""
    examples = result.get("examples") or []
    limit, sections = _limit(examples), []
    labels = NAMES | {other["name"]: other["label"] for other in result.get("compared", ())}
    for kind, title in TITLES.items():
        chosen = [example for example in examples if example.get("kind", "spread") == kind]
        if not chosen:
            continue
        full = kind == "spread"
        methods = _in_order(labels) if full else ["original", "model", "heat"]
        rows = [example_row(folder, example, methods, labels, limit) for example in chosen]
        smaller = (
            f" Shown at {limit} pixels at most; the files in examples/ are larger."
            if _shrunk(folder, chosen, limit)
            else ""
        )
        gallery = Gallery(rows, CAPTIONS[kind] + smaller, pairs=not full)
        has_heat = any("heat" in example["files"] for example in chosen)
        sections.append(Section(title, [*([heat_scale()] if has_heat and not sections else []), gallery]))
    return sections


def heat_scale() -> Scale:
    """The legend of the error maps."""
    *ticks, last = (str(tick) for tick in TICKS)
    title = f"Colours of the error: root mean square over the channels, in levels of 255. {BRIGHTEST:g} and more are brightest."
    return Scale(heat_gradient(), [*ticks, f"{last}+"], title)


def _in_order(labels: Mapping[str, str]) -> list[str]:
    """The image, the model and its error; then compared models; then baselines."""
    return sorted(labels, key=lambda name: (name not in ("original", "model", "heat"), name in NAMES))


def example_row(
    folder: Path,
    example: Mapping[str, Any],
    methods: Sequence[str],
    labels: Mapping[str, str],
    limit: int = LARGEST,
) -> GalleryRow:
    """An image and what methods made of it, as far as there are files, with the PSNR of each.

    Args:
        folder: of the evaluation.
        example: of its result.
        methods: by name, in the order shown; "original" is the image.
        labels: of the methods.
        limit: pixels of the longer side, at most.
    """
    files, psnr = example["files"], example.get("psnr", {})
    order = [name for name in methods if name in files]
    pictures = [
        Picture(shown(read_png(folder / files[name]), limit), labels[name], _detail(name, psnr))
        for name in order
    ]
    return GalleryRow(example["key"], pictures)


def _detail(name: str, psnr: Mapping[str, float | None]) -> str:
    if name not in psnr:
        return ""
    value = psnr[name]
    return "identical" if value is None or not math.isfinite(value) else f"{value:.2f} dB"


def _limit(examples: Sequence[Mapping[str, Any]]) -> int:
    """The longer side that lets all pictures of a page share its pixels."""
    pictures = sum(
        len(example["files"]) if example.get("kind", "spread") == "spread" else 3 for example in examples
    )
    return min(LARGEST, int(math.sqrt(PAGE_PIXELS / max(pictures, 1))))


def _shrunk(folder: Path, examples: Sequence[Mapping[str, Any]], limit: int) -> bool:
    with Image.open(folder / examples[0]["files"]["original"]) as image:
        return max(image.size) > limit


def shown(image: Tensor, limit: int = LARGEST) -> Tensor:
    """uint8 [3, H, W] with its longer side shrunk to `limit` pixels, each the mean of those it covers; smaller ones as they are."""
    height, width = image.shape[1:]
    if max(height, width) <= limit:
        return image
    times = limit / max(height, width)
    size = (max(round(width * times), 1), max(round(height * times), 1))
    small = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize(size, Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()


def read_png(path: str | Path) -> Tensor:
    """A PNG file that `evaluate` wrote, as uint8 [3, H, W]; gray is repeated, transparent images lie on white."""
    with Image.open(path) as image:
        if image.mode in ("RGBA", "LA"):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()

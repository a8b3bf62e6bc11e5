"""The second look, at a few images alone: pictures, what happens to disturbed latents, rate and distortion, diffusability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latentae.evaluation.measure import MODEL, QUANTISED, Instruments, Loaded
from latentae.evaluation.measurement import Measurement
from latentae.evaluation.work import spread
from latentae.measures.latents.diagnose import Diagnosis
from latentae.measures.ranking import rank

__all__ = ["EXAMPLES", "Example", "Shown", "choose", "make_examples"]

EXAMPLES, EXTREMES = 6, 3
SAME_PSNR = 1e-3
"""dB up to which two images count as equally hard: rounding in the model moves a few pixels of an image by one level."""


@dataclass(frozen=True)
class Example:
    """One image and what each method made of it: uint8 [C, H, W] and PSNR in dB.

    Methods without a result are left out, and so are the 8-bit latents, which the eye can't tell from the model.
    """

    kind: str
    """"spread" (evenly over the images), "worst" or "best" by the model's PSNR."""
    key: str
    original: Tensor
    images: dict[str, Tensor]
    psnr: dict[str, float]


@dataclass
class Shown:
    """Everything that the second look gave."""

    examples: list[Example] = field(default_factory=list)
    diagnosis: Diagnosis | None = None
    rate_distortion: dict[str, Any] = field(default_factory=dict)
    diffusability: dict[str, Any] | None = None
    pictures: dict[str, Tensor] = field(default_factory=dict)
    """By file name."""


def choose(measurement: Measurement) -> dict[str, list[int]]:
    """Rows of the images to show, by kind; worst and best where there are enough images for them to be others."""
    rows = {"spread": spread(len(measurement.keys), EXAMPLES)}
    if len(measurement.keys) >= 2 * EXTREMES:
        values = measurement.scores[MODEL].values["psnr"]
        ranked = list(rank(values, relative=0.0, absolute=SAME_PSNR))
        rows |= {"worst": ranked[:EXTREMES], "best": ranked[: -EXTREMES - 1 : -1]}
    return rows


@torch.inference_mode()
def make_examples(
    instruments: Instruments,
    chosen: dict[str, list[int]],
    images: dict[int, Loaded],
    measurement: Measurement,
    batch_size: int,
) -> list[Example]:
    """Reconstruct the chosen images once more; PSNR is that of the measurement."""
    rows = sorted({row for rows in chosen.values() for row in rows})
    made: dict[int, dict[str, Tensor]] = {}
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        originals = torch.stack([_image(images[row]) for row in batch]).to(instruments.device)
        found, _ = instruments.reconstruct(originals, [measurement.keys[row] for row in batch])
        for place, row in enumerate(batch):
            made[row] = {
                name: result.images[place].cpu()
                for name, result in found.items()
                if place not in result.missing
            }
    return [
        _example(kind, row, images[row], made[row], measurement)
        for kind, rows_of_kind in chosen.items()
        for row in rows_of_kind
    ]


def _example(
    kind: str, row: int, loaded: Loaded, made: dict[str, Tensor], measurement: Measurement
) -> Example:
    values = {method: measurement.scores[method].values["psnr"][row] for method in made}
    shown = [method for method in made if method != QUANTISED and not math.isnan(values[method])]
    psnr = {method: values[method] for method in shown}
    return Example(kind, loaded.key, _image(loaded), {method: made[method] for method in shown}, psnr)


def _image(loaded: Loaded) -> Tensor:
    assert loaded.image is not None, (
        "an image that was read once can't be read again; the shards have changed"
    )
    return loaded.image


def stack(images: Sequence[Loaded]) -> Tensor:
    """uint8 [N, C, R, R] of images that could be read."""
    return torch.stack([_image(item) for item in images])

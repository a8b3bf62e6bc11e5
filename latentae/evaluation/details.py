"""Details on a few images: examples, disturbed latents, rate and distortion, diffusability."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latentae.data.loader import Batch
from latentae.evaluation.loaded_inputs import LoadedInputs
from latentae.evaluation.measure_images import Loaded
from latentae.evaluation.measurement import MODEL, QUANTIZED, Measurement, spread
from latentae.evaluation.rate_distortion import RATE_DISTORTION_IMAGES, rate_distortion
from latentae.measures.frechet import Extractor
from latentae.measures.latents.diagnose import diagnose
from latentae.measures.scores import rank
from latentae.progress import say

__all__ = ["Details", "Example", "choose_examples", "measure_details"]

EXAMPLES, EXTREMES = 6, 3
SAME_PSNR = 1e-3  # dB: rounding in the model moves a few pixels of an image by one level
DIAGNOSED = 32
INTERPOLATION = "examples/interpolation.png"


@dataclass(frozen=True)
class Example:
    """One image and its reconstructions, uint8 [C, H, W], with the PSNR of each in dB.

    Methods without a result are left out. So are 8-bit latents, which look the same as the model.

    Attributes:
        kind: "spread" (evenly over the images), "worst" or "best" by the model's PSNR.
        key: of the image.
        original: the image.
        images: reconstructions by method.
        psnr: by method.
    """

    kind: str
    key: str
    original: Tensor
    images: dict[str, Tensor]
    psnr: dict[str, float]


@dataclass
class Details:
    """Results on a few images.

    Attributes:
        examples: images to show.
        diagnostics: result of `diagnose`; None if not requested.
        rate_distortion: result of `rate_distortion`; None if not requested.
        diffusability: result of `diffusability`; None if not requested.
        pictures: uint8 [C, H, W] by file name.
    """

    examples: list[Example] = field(default_factory=list)
    diagnostics: dict[str, Any] | None = None
    rate_distortion: dict[str, Any] | None = None
    diffusability: dict[str, Any] | None = None
    pictures: dict[str, Tensor] = field(default_factory=dict)


def measure_details(inputs: LoadedInputs, measurement: Measurement) -> Details:
    """Reconstruct examples, and measure the details that the options request."""
    details = Details(_examples(inputs, measurement))
    if inputs.options.details:
        _add_diagnostics(inputs, measurement, details)
    if inputs.options.diffusability:
        _add_diffusability(inputs, measurement, details)
    return details


@torch.inference_mode()
def _examples(inputs: LoadedInputs, measurement: Measurement) -> list[Example]:
    chosen = choose_examples(measurement)
    rows = sorted({row for rows in chosen.values() for row in rows})
    loaded = dict(zip(rows, _reload(inputs, measurement, rows), strict=True))
    instruments, size = inputs.instruments(), inputs.options.batch_size
    restored: dict[int, dict[str, Tensor]] = {}
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        originals = torch.stack([loaded[row].pixels for row in batch]).to(inputs.device)
        results, _ = instruments.reconstruct(originals, [loaded[row].key for row in batch])
        for place, row in enumerate(batch):
            restored[row] = {
                name: result.images[place].cpu()
                for name, result in results.items()
                if place not in result.missing and name != QUANTIZED
            }
    examples = []
    for kind, row in ((kind, row) for kind, rows in chosen.items() for row in rows):
        psnr = {method: measurement.scores[method].values["psnr"][row] for method in restored[row]}
        psnr = {method: value for method, value in psnr.items() if not math.isnan(value)}
        images = {method: restored[row][method] for method in psnr}
        examples.append(Example(kind, loaded[row].key, loaded[row].pixels, images, psnr))
    return examples


def choose_examples(measurement: Measurement) -> dict[str, list[int]]:
    """Rows of the images to show, by kind; worst and best only if there are enough images."""
    rows = {"spread": spread(len(measurement.keys), EXAMPLES)}
    if len(measurement.keys) >= 2 * EXTREMES:
        ranked = list(rank(measurement.scores[MODEL].values["psnr"], relative=0.0, absolute=SAME_PSNR))
        rows |= {"worst": ranked[:EXTREMES], "best": ranked[: -EXTREMES - 1 : -1]}
    return rows


def _add_diagnostics(inputs: LoadedInputs, measurement: Measurement, details: Details) -> None:
    rows = spread(len(measurement.keys), DIAGNOSED)
    images = torch.stack([item.pixels for item in _reload(inputs, measurement, rows)])
    assert measurement.latents.statistics is not None
    say(f"measuring equivariance, noise and half precision on {len(images)} images")
    details.diagnostics, strip = diagnose(
        inputs.model,
        images,
        statistics=measurement.latents.statistics,
        keys=[measurement.keys[row] for row in rows],
        batch_size=inputs.options.batch_size,
        device=inputs.device,
        seed=inputs.options.seed,
    )
    if strip is not None:
        details.pictures[INTERPOLATION] = strip
        details.diagnostics["interpolation"]["file"] = INTERPOLATION
    pca, dct = inputs.bases
    details.rate_distortion = rate_distortion(
        {loaded.name: loaded.model for loaded in inputs.models},
        images[spread(len(images), RATE_DISTORTION_IMAGES)],
        pca=pca,
        dct=dct,
        labels={loaded.name: loaded.label for loaded in inputs.models},
        batch_size=inputs.options.batch_size,
        device=inputs.device,
    )


def _add_diffusability(inputs: LoadedInputs, measurement: Measurement, details: Details) -> None:
    from latentae.evaluation.diffusability.diffusability import diffusability
    from latentae.evaluation.diffusability.latents import LATENTS

    assert isinstance(inputs.extractor, Extractor)
    assert measurement.latents.statistics is not None
    result, pictures = diffusability(
        inputs.model,
        _batches(inputs, measurement, spread(len(measurement.keys), LATENTS)),
        inputs.extractor,
        neighbors=None if inputs.training.index is None else inputs.training_images(LATENTS),
        statistics=measurement.latents.statistics,
        seed=inputs.options.seed,
        device=inputs.device,
    )
    files = {name: f"examples/diffusability-{name}.png" for name in pictures}
    details.diffusability = {**result, "files": files}
    details.pictures.update({files[name]: picture for name, picture in pictures.items()})


def _batches(inputs: LoadedInputs, measurement: Measurement, rows: list[int]) -> Iterator[Batch]:
    """The images of some rows, one batch in memory at a time."""
    size = inputs.options.batch_size
    for start in range(0, len(rows), size):
        loaded = list(_reload(inputs, measurement, rows[start : start + size]))
        images = torch.stack([item.pixels for item in loaded]).contiguous(memory_format=torch.channels_last)
        yield Batch(tuple(item.key for item in loaded), images)


def _reload(inputs: LoadedInputs, measurement: Measurement, rows: list[int]) -> Iterator[Loaded]:
    """Load the images of some rows again."""
    return inputs.images_at([measurement.positions[row] for row in rows])

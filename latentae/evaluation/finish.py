"""From measured chunks to results: merge them, take the second look, and say what was found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from latentae.data.loader import Batch
from latentae.evaluation.measure import MODEL, Loaded, load_images
from latentae.evaluation.measurement import Measurement, join
from latentae.evaluation.rate_distortion import RATE_DISTORTION_IMAGES, rate_distortion
from latentae.evaluation.results import summarise
from latentae.evaluation.setting import Setting
from latentae.evaluation.showing import Shown, choose, make_examples, stack
from latentae.evaluation.work import PartsFolder, samples_at, spread
from latentae.measures.extractors import Extractor
from latentae.measures.latents.diagnose import diagnose
from latentae.progress import say

__all__ = ["finish"]

DIAGNOSED = 32
INTERPOLATION = "examples/interpolation.png"


def finish(setting: Setting, parts: PartsFolder) -> tuple[dict[str, Any], Measurement, Shown]:
    """What metrics.json will hold but for the examples, the rows behind it, and the pictures.

    Raises:
        ImageError: no image could be read.
    """
    measurement = join(parts.parts())
    shown = _second_look(setting, measurement)
    return summarise(setting, measurement, shown), measurement, shown


def _second_look(setting: Setting, measurement: Measurement) -> Shown:
    chosen = choose(measurement)
    images = _reload(setting, measurement, sorted({row for rows in chosen.values() for row in rows}))
    shown = Shown(make_examples(setting.instruments(), chosen, images, measurement, setting.batch_size))
    if setting.details:
        _add_details(setting, measurement, shown)
    if setting.diffusability:
        _add_diffusability(setting, measurement, shown)
    return shown


def _add_details(setting: Setting, measurement: Measurement, shown: Shown) -> None:
    rows = spread(len(measurement.keys), DIAGNOSED)
    few = stack(list(_reload(setting, measurement, rows).values()))
    assert measurement.latents.statistics is not None
    say(f"looking closer at {len(few)} images")
    shown.diagnosis = diagnose(
        setting.model,
        few,
        statistics=measurement.latents.statistics,
        keys=[measurement.keys[row] for row in rows],
        batch_size=setting.batch_size,
        device=setting.device,
        seed=setting.seed,
    )
    if shown.diagnosis.strip is not None:
        shown.pictures[INTERPOLATION] = shown.diagnosis.strip
    pca, dct = setting.bases
    shown.rate_distortion = rate_distortion(
        {MODEL: setting.model, **{other.name: other.model for other in setting.compared}},
        few[spread(len(few), RATE_DISTORTION_IMAGES)],
        pca=pca,
        dct=dct,
        labels={MODEL: "this model", **{other.name: other.label for other in setting.compared}},
        batch_size=setting.batch_size,
        device=setting.device,
    )


def _reload(setting: Setting, measurement: Measurement, rows: list[int]) -> dict[int, Loaded]:
    """The images of these rows, by row."""
    samples = samples_at(setting.index, [measurement.positions[row] for row in rows])
    return dict(
        zip(rows, load_images(samples, setting.resolution, setting.channels, setting.max_pixels), strict=True)
    )


def _add_diffusability(setting: Setting, measurement: Measurement, shown: Shown) -> None:
    from latentae.evaluation.diffusability import diffusability
    from latentae.evaluation.diffusability.latents import LATENTS

    assert isinstance(setting.extractor, Extractor)
    assert measurement.latents.statistics is not None
    training = setting.training
    neighbours = None
    if training.index is not None:
        neighbours = setting.training_images(LATENTS)
    found = diffusability(
        setting.model,
        _batches(setting, measurement, spread(len(measurement.keys), LATENTS)),
        setting.extractor,
        neighbours=neighbours,
        statistics=measurement.latents.statistics,
        seed=setting.seed,
        device=setting.device,
    )
    files = {name: f"examples/diffusability-{name}.png" for name in found.pictures}
    shown.diffusability = {**found.result, "files": files}
    shown.pictures.update({files[name]: picture for name, picture in found.pictures.items()})


def _batches(setting: Setting, measurement: Measurement, rows: list[int]) -> Iterator[Batch]:
    """The images of these rows, one batch in memory at a time."""
    for start in range(0, len(rows), setting.batch_size):
        some = rows[start : start + setting.batch_size]
        images = list(_reload(setting, measurement, some).values())
        yield Batch(
            tuple(image.key for image in images), stack(images).contiguous(memory_format=torch.channels_last)
        )

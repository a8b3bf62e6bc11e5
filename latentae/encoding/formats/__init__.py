"""Latents in the layouts of diffusion trainers, which `write` writes.

lightningdit   samples, raw, also of flipped images; labels and statistics
edm2           mean and standard deviation
repa           mean and standard deviation, and the images
mar            mean and log-variance, also of flipped images; one folder per class
fastdit        samples times the scaling factor
kohya          samples, raw; images and captions
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latentae.data.sources import is_remote, shown
from latentae.encoding.formats import class_conditional, kohya
from latentae.encoding.formats.layout import Layout, remove_staging
from latentae.encoding.latent_dataset import LatentDataset
from latentae.encoding.latent_shard import JSON_MEMBER, MISSING_LABELS
from latentae.errors import DataError, OutputError, RecipeError
from latentae.files import alone
from latentae.jobs import Job
from latentae.keyed import whole_seed
from latentae.progress import say

__all__ = ["FORMATS", "Format", "write"]


class Format(NamedTuple):
    """A layout, its options with their defaults, and what it needs of the latents."""

    build: Callable[[Layout, LatentDataset, dict[str, Any]], None]
    options: Mapping[str, Any] = {}
    check: Callable[[LatentDataset, Path, dict[str, Any]], None] | None = None
    labels: bool = True
    flips: bool = False
    images: bool = False
    buckets: bool = False
    """Whether it accepts several sizes."""


FORMATS = {
    "lightningdit": Format(class_conditional.build_lightningdit, {"seed": 0}, flips=True),
    "edm2": Format(class_conditional.build_edm2, {"folder": False}),
    "repa": Format(class_conditional.build_repa, images=True),
    "mar": Format(class_conditional.build_mar, check=class_conditional.check_mar, flips=True),
    "fastdit": Format(
        class_conditional.build_fastdit, {"seed": 0, "scaling": None}, class_conditional.check_fastdit
    ),
    "kohya": Format(kohya.build, {"seed": 0, "model": "sd"}, kohya.check, labels=False, buckets=True),
}


def write(format: str, latents: str | Path, out: str | Path, **options: Any) -> Path:
    """Write the latents of a finished output of `encode` in the layout of a diffusion trainer.

    The layout is built in a temporary folder inside `out` and moved when it is complete. The same
    call resumes an interrupted one with the missing shards.

    Args:
        format: one of FORMATS.
        latents: the output of `encode`, a folder or an fsspec URL.
        out: a local folder, empty or of the same job.
        options: of the format: `seed` of the noise (lightningdit, fastdit, kohya), `scaling`
            (fastdit; defaults to the latents' scaling factor), `folder` (edm2; a folder instead of
            a zip), `model` (kohya; "sd" or "sdxl", the suffix of its file names).

    Returns:
        The path for the trainer: `out`, or for edm2 the zip in it.

    Raises:
        RecipeError: an unknown format or option.
        OutputError: the latents do not fit the format (several sizes, no flips, no images, for
            kohya repeated keys or too long file names), or `out` holds something else.
        DataError: the format needs class labels and some samples have none.
        ShardError: a latent shard is damaged.
    """
    if format not in FORMATS:
        raise RecipeError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    if is_remote(str(out)):
        raise OutputError(f"{shown(str(out))} is not a local folder; {format} needs one")
    chosen = FORMATS[format]
    options = _resolve(format, chosen.options, options)
    dataset, out = LatentDataset(latents), Path(out)
    _check(format, dataset)
    if chosen.check is not None:
        chosen.check(dataset, out, options)
    verb, inputs = f"encode --format {format}", {"latents": dataset.digest, **options}
    Job.open(out, verb, inputs)
    with alone(out):  # two tasks may end at the same time
        job = Job.open(out, verb, inputs)
        if job.state == "finished":
            say(f"{out} is already finished: {len(dataset)} latents for {format}; nothing to do")
        else:
            layout = Layout(out, dataset, format)
            if not layout.built:
                chosen.build(layout, dataset, options)
            layout.publish()
            job.finish(samples=len(dataset))
            say(f"encode: {len(dataset)} latents for {format} in {out}")
        remove_staging(out)
    return out / class_conditional.EDM2_ZIP if format == "edm2" and not options["folder"] else out


def _resolve(format: str, known: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The options of a format, with defaults."""
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise RecipeError(f"{format} has no option {unknown!r}; it has {', '.join(known) or 'none'}")
    options = {**known, **given}
    return {**options, "seed": whole_seed(options["seed"])} if "seed" in options else options


def _check(name: str, dataset: LatentDataset) -> None:
    """Check that the latents have what the format needs."""
    needs = FORMATS[name]
    sizes = [f"{height}x{width}" for height, width in np.unique(dataset.sizes, axis=0)]
    if len(sizes) != 1 and not needs.buckets:
        found = ", ".join(sizes[:4]) or "no latents"
        raise OutputError(
            f"{name} takes latents of one size, found {found}; encode with --resolution and without --buckets"
        )
    if needs.flips and not dataset.flips:
        raise OutputError(
            f"{name} also reads latents of flipped images, and none are stored; encode again with --flip"
        )
    if needs.labels and len(missing := np.flatnonzero(dataset.labels < 0)):
        raise DataError(
            f"{name} needs a class label for each sample; {len(missing)} of {len(dataset)} have none, the "
            f"first is {dataset.keys[int(missing[0])]!r}; {MISSING_LABELS}"
        )
    if needs.images and dataset.meta(0)[JSON_MEMBER]["source"] not in dataset.members(0):
        raise OutputError(
            f"{name} also reads the images, and none are stored; encode again with --keep-images"
        )

"""From our layout of latents to another trainer's: whole or not there, the same bytes each time."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from latentae.encoding.formats.layout import Layout, remove_staging
from latentae.encoding.latents import LatentDataset
from latentae.encoding.store import Store
from latentae.errors import OutputError, RecipeError
from latentae.files import alone
from latentae.jobs import Job
from latentae.keyed import whole_seed
from latentae.progress import say

__all__ = ["FORMATS", "write"]

FORMATS = ("lightningdit", "edm2", "repa", "mar", "fastdit", "kohya")


def write(format: str, latents: str | Path, out: str | Path, **options: Any) -> Path:
    """Write the latents of a finished output of `encode` in the layout of another trainer.

    The layout is built in a folder inside `out` that ends in `.incomplete` and gets its names when it is whole. A run that was
    stopped goes on with the shards that are missing; a finished one says so.

    Args:
        format: one of FORMATS.
        latents: the output of `encode`, a folder or an fsspec URL.
        out: a local folder, empty or of this very job.
        options: of the format: `seed` of the noise (lightningdit, fastdit, kohya), `scaling` (fastdit; that of the latents if not
            given), `folder` (edm2; rather than a zip), `model` (kohya; "sd" or "sdxl", the ending of its file names).

    Returns:
        What the trainer is given: `out`, or for edm2 the zip in it.

    Raises:
        RecipeError: no such format or option.
        OutputError: the latents can't be written so (several sizes, no flips, no kept images, for kohya keys that repeat or are too
            long for file names), or `out` holds something else.
        DataError: class labels are needed and some samples have none.
        ShardError: a latent shard is damaged.
    """
    if format not in FORMATS:
        raise RecipeError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    module = importlib.import_module(f"latentae.encoding.formats.{format}")
    options = _resolve(format, module.OPTIONS, options)
    if not Store.open(out).is_local:
        raise OutputError(
            f"{Store.open(out).shown} is not a local folder; {format} reads files, write them to a local folder"
        )
    dataset, out = LatentDataset(latents), Path(out)
    module.check(dataset, options)
    if format == "kohya":  # the only one whose files are named after samples
        shards = zip(dataset.shards, dataset.shard_ranges, strict=True)
        module.check_names(
            out, ((dataset.keys[index], shard) for shard, rows in shards for index in rows), options["model"]
        )
    verb, inputs = f"encode --format {format}", {"latents": dataset.digest, **options}
    Job.open(out, verb, inputs)
    with alone(out):  # two tasks may end at the same time
        job = Job.open(out, verb, inputs)
        if job.state == "finished":
            say(f"{out} is already finished: {len(dataset)} latents for {format}; nothing to do")
        else:
            layout = Layout(out, dataset, format)
            if not layout.built:
                module.build(layout, dataset, options)
            layout.publish()
            job.finish(samples=len(dataset))
            say(f"encode: {len(dataset)} latents for {format} in {out}")
        remove_staging(out)
    return out / module.target(options)


def _resolve(format: str, known: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The options of a format, with what was not given."""
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise RecipeError(f"{format} has no option {unknown!r}; it has {', '.join(known) or 'none'}")
    options = {**known, **given}
    return {**options, "seed": whole_seed(options["seed"])} if "seed" in options else options

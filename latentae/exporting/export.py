"""The verb `export`: a model of ours as a folder that other libraries load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latentae.errors import OutputError, RecipeError
from latentae.exporting.card import CardFacts, model_card
from latentae.exporting.diffusers import VARIANTS, component_config, write_diffusers
from latentae.exporting.measured import read_latents, read_metrics
from latentae.exporting.scaling import choose_scaling
from latentae.files import sha256, staged_folder, write_text
from latentae.jobs import RECORD, Job
from latentae.models.pretrained import ModelSource, load_model, resolve_model
from latentae.progress import say
from latentae.version import __version__

__all__ = ["FORMATS", "export"]

FORMATS = ("diffusers",)
CARD = "README.md"


def export(
    model: str | Path,
    out: str | Path,
    *,
    format: str = "diffusers",
    variant: str | None = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    statistics: str | Path | None = None,
    metrics: Mapping[str, Any] | str | Path | None = None,
    weights: str = "ema",
) -> dict[str, Any]:
    """Write a model as a component that others load; the folder appears whole or not at all.

    Args:
        model: run folder, checkpoint, exported folder or safetensors file.
        out: folder to make; the same export again says it is done.
        format: "diffusers": a folder for `diffusers.AutoencoderKL.from_pretrained`.
        variant: "fp16" or "bf16": write the weights once more in half precision.
        scaling_factor: what a diffusion model multiplies latents by; measured or the config's if not given.
        shift_factor: what is subtracted before; measured or the config's if not given.
        statistics: output folder of `encode` or `evaluate` (or the JSON file in it), for measured factors.
        metrics: what the card says of quality: what `evaluate` returned or wrote, or name -> number.
        weights: "ema" or "raw" weights of a run.

    Returns:
        A summary: `out`, `format`, `scaling_factor`, `shift_factor`, `files`.

    Raises:
        RecipeError: an unknown format or variant, or a factor, statistics or metrics that can't be used.
        ModelError: no such model, weights that are not finite, or statistics of another model.
        OutputError: `out` can't be written or holds something else.
    """
    if format not in FORMATS:
        raise RecipeError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    if variant is not None and variant not in VARIANTS:
        raise RecipeError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
    out = Path(out)
    source = resolve_model(model, weights)
    latents = None if statistics is None else read_latents(statistics, source.fingerprint, source.config.latent_channels)
    scaling = choose_scaling(source.config, latents, scaling_factor, shift_factor)
    quality = read_metrics(metrics, source.fingerprint)
    options = {"format": format, "variant": variant, "scaling": asdict(scaling), "metrics": quality}
    inputs = json.loads(json.dumps({"model": source.fingerprint, "resolution": source.resolution, **options}))
    summary = {"out": str(out), "format": format, "scaling_factor": scaling.scaling_factor, "shift_factor": scaling.shift_factor}
    if (out / RECORD).is_file():
        Job.open(out, "export", inputs)  # refuses another job's folder
        files = _intact_files(out)
        say(f"export: {out} already holds this export; nothing to do")
        return {**summary, "files": files}

    with staged_folder(out) as staging:
        job = Job.open(staging, "export", inputs)
        autoencoder, _ = load_model(source.weights_file)  # not source.path: a run may have moved on
        config = component_config(
            source.config, resolution=source.resolution, scaling_factor=scaling.scaling_factor, shift_factor=scaling.shift_factor
        )
        write_diffusers(autoencoder, config, staging, variant)
        parameters = sum(p.numel() for p in autoencoder.parameters())
        words = _weights_in_words(source, weights)
        facts = CardFacts(out.name, config, scaling, parameters, source.resolution, words, __version__, variant, quality)
        write_text(staging / CARD, model_card(facts))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(staging.iterdir()) if p.name != RECORD}
        job.finish(weights=words, parameters=parameters, files=files)
    say(f"export: wrote {out} ({', '.join(files)})")
    return {**summary, "files": files}


def _weights_in_words(source: ModelSource, weights: str) -> str:
    """For the card: which weights, without this machine's paths."""
    if source.kind in ("run", "checkpoint"):
        return f"{'EMA' if weights == 'ema' else 'raw (not EMA)'} weights of a training run, {source.weights_file.parent.name}"
    return f"as in {source.weights_file.name}"


def _intact_files(folder: Path) -> dict[str, Any]:
    """The files of a finished export, as recorded; an error where one is missing or has another size."""
    files = Job.read(folder).get("files", {})
    for name, facts in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise OutputError(f"{path} is missing or damaged; delete {folder} and export again")
    return files

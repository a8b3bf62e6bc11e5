"""The verb `export`: a model of ours as a folder that other libraries load.

OUT/ config.json, diffusion_pytorch_model[.fp16].safetensors   diffusers
     config.json, vae.ldm.safetensors                          ldm
     vae_encoder/, vae_decoder/                                onnx
     pt2/                                                      pt2
     latent_statistics.json, latent_preview.json               where they were measured
     training/                                                 all, of a run
     README.md, latentae.json                                  the model card, and where everything came from
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentae.data.headers import MAX_PIXELS
from latentae.device import choose_device
from latentae.errors import OutputError
from latentae.exporting.building import ExportPlan, build
from latentae.exporting.card import model_card
from latentae.exporting.figures import data_request
from latentae.exporting.formats import check_format
from latentae.exporting.kinds import check_kind, exportable
from latentae.exporting.measured import read_latents, read_metrics
from latentae.exporting.push import check_repository, push
from latentae.exporting.scaling import check_scaling
from latentae.files import sha256, staged_folder, write_text
from latentae.jobs import RECORD, Job
from latentae.models.pretrained import resolve_model
from latentae.progress import say

__all__ = ["export"]

CARD = "README.md"


def export(
    model: str | Path,
    out: str | Path,
    *,
    format: str = "diffusers",
    fold_normalization: bool = False,
    variant: str | None = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    statistics: str | Path | None = None,
    metrics: Mapping[str, Any] | str | Path | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    images: int = 256,
    resolution: int | Sequence[int] | None = None,
    batch_size: int = 8,
    perceptual: str = "auto",
    push_to_hub: str | None = None,
    weights: str = "ema",
    device: str = "auto",
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Any]:
    """Write a model as a component that others load; the folder appears whole or not at all.

    An AutoencoderDC has no posterior in diffusers: what is written, and measured, has the mean for its latent.

    Args:
        model: run folder, checkpoint, exported folder, file of weights or owner/name on the Hub.
        out: folder to make; the same export again says it is done.
        format: "diffusers", "ldm" (one file under LDM's names, of an AutoencoderKL; the log says which programs load it), "onnx",
            "pt2" (AOTInductor), or "all" of them that the model can have, with what a further training needs.
        fold_normalization: normalise latents by channel inside the weights, so that scaling is 1 and shift 0; needs statistics or data.
        variant: "fp16" or "bf16": write the diffusers weights once more in half precision.
        scaling_factor: what a diffusion model multiplies latents by; measured or the config's if not given.
        shift_factor: what is subtracted before; measured or the config's if not given.
        statistics: output folder of `encode` or `evaluate` (or the JSON file in it), for measured factors; goes before `data`.
        metrics: what the card says of quality: what `evaluate` returned or wrote, or name -> number; a run's last validation if neither
            this nor data is given.
        data: shards to measure on: quality, latents, previews, half precision and tiling.
        images: at most so many of them, the first in shard order.
        resolution: image side in pixels to measure at, or several: quality at each, latents, previews and half precision at the
            first. The model's own if not given.
        batch_size: images at a time when measuring.
        perceptual: distance to measure, as for `evaluate`.
        push_to_hub: "owner/name" of a repository on the Hugging Face Hub to upload the folder to; made if it is not there.
        weights: "ema" or "raw" weights of a run.
        device: where to measure, and what a "pt2" package is compiled for: "auto", "cpu", "cuda" or "cuda:N".
        max_pixels: refuse images of more pixels by their header.

    Returns:
        A summary: `out`, `format`, `scaling_factor`, `shift_factor`, `files`, and `repository` (an address) if it was uploaded.

    Raises:
        RecipeError: an option, or a factor, statistics or metrics that can't be used.
        ModelError: no such model, weights that are not finite, or statistics of another model.
        OutputError: `out` can't be written or holds something else, or the upload failed (the same command tries only that again).
        MissingDependencyError: a format needs a package that is not installed.
        DataError: `data` can't be read.
    """
    check_format(format, variant)
    check_scaling(
        scaling_factor, shift_factor, fold_normalization, statistics is not None or data is not None
    )
    check_repository(push_to_hub)
    source, where = resolve_model(model, weights), choose_device(device)
    config = exportable(source.config, str(model))
    check_kind(config, format, fold_normalization, shift_factor)
    sizes = [resolution] if isinstance(resolution, int) else resolution
    options = {
        "resolutions": sizes,
        "images": images,
        "batch_size": batch_size,
        "perceptual": perceptual,
        "max_pixels": max_pixels,
    }
    plan = ExportPlan(
        source=source,
        config=config,
        weights=weights,
        format=format,
        variant=variant,
        fold=fold_normalization,
        factors={"scaling_factor": scaling_factor, "shift_factor": shift_factor},
        latents=None
        if statistics is None
        else read_latents(statistics, source.fingerprint, source.config.latent_channels),
        metrics=read_metrics(metrics, source.fingerprint),
        request=None if data is None else data_request(source, data, **options, device=where),
        device=where,
    )
    record = _finished(Path(out), plan) or _make(Path(out), plan)
    summary = {"out": str(out), "format": format, **record["scaling"], "files": record["files"]}
    return summary if push_to_hub is None else {**summary, "repository": push(Path(out), CARD, push_to_hub)}


def _finished(out: Path, plan: ExportPlan) -> dict[str, Any] | None:
    """The record of this very export if it is there; an error where another is, or a file of it is missing or of another size."""
    if not (out / RECORD).is_file():
        return None
    Job.open(out, "export", plan.inputs())  # refuses another job's folder
    record = Job.read(out)
    for name, facts in record.get("files", {}).items():
        path = out / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise OutputError(f"{path} is missing or damaged; delete {out} and export again")
    say(f"export: {out} already holds this export; nothing to do")
    return record


def _make(out: Path, plan: ExportPlan) -> dict[str, Any]:
    """Do the work; the record that the folder then holds."""
    with staged_folder(out) as staging:
        job = Job.open(staging, "export", plan.inputs())
        facts = build(plan, staging, out.name)
        write_text(staging / CARD, model_card(facts))
        paths = sorted(path for path in staging.rglob("*") if path.is_file() and path.name != RECORD)
        files = {
            p.relative_to(staging).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in paths
        }
        job.finish(**facts.record(), files=files)
    for note in facts.ldm_notes:
        say(f"export: note: {note}")
    say(f"export: wrote {out} ({', '.join(dict.fromkeys(name.split('/')[0] for name in files))})")
    return Job.read(out)

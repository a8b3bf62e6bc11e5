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

from pathlib import Path
from typing import Any

from latentae.device import choose_device
from latentae.errors import OutputError
from latentae.exporting.building import ExportPlan, build
from latentae.exporting.card import model_card
from latentae.exporting.figures import data_request
from latentae.exporting.formats import check_format
from latentae.exporting.kinds import check_kind, exportable
from latentae.exporting.measured import read_latents, read_metrics
from latentae.exporting.options import ExportOptions
from latentae.exporting.push import check_repository, push
from latentae.exporting.scaling import check_scaling
from latentae.file_names import RECORD
from latentae.files import sha256, staged_folder, write_text
from latentae.jobs import Job
from latentae.models.pretrained import resolve_model
from latentae.options import verb
from latentae.progress import say

__all__ = ["export"]

CARD = "README.md"


@verb(ExportOptions)
def export(options: ExportOptions) -> dict[str, Any]:
    """Write a model as a component that others load; the folder appears whole or not at all.

    An AutoencoderDC has no posterior in diffusers: what is written, and measured, has the mean for its latent.

    Returns:
        A summary: `out`, `format`, `scaling_factor`, `shift_factor`, `files`, and `repository` (an address) if it was uploaded.

    Raises:
        RecipeError: an option, or a factor, statistics or metrics that can't be used.
        ModelError: no such model, weights that are not finite, or statistics of another model.
        OutputError: `out` can't be written or holds something else, or the upload failed (the same command tries only that again).
        MissingDependencyError: a format needs a package that is not installed.
        DataError: `data` can't be read.
    """
    check_format(options.format, options.variant)
    check_scaling(
        options.scaling_factor,
        options.shift_factor,
        options.fold_normalization,
        options.statistics is not None or options.data is not None,
    )
    check_repository(options.push_to_hub)
    source, where = resolve_model(options.model, options.weights), choose_device(options.device)
    config = exportable(source.config, str(options.model))
    check_kind(config, options.format, options.fold_normalization, options.shift_factor)
    sizes = [options.resolution] if isinstance(options.resolution, int) else options.resolution
    measuring = {
        "resolutions": sizes,
        "images": options.images,
        "batch_size": options.batch_size,
        "perceptual": options.perceptual,
        "max_pixels": options.max_pixels,
    }
    plan = ExportPlan(
        source=source,
        config=config,
        weights=options.weights,
        format=options.format,
        variant=options.variant,
        fold=options.fold_normalization,
        factors={"scaling_factor": options.scaling_factor, "shift_factor": options.shift_factor},
        latents=None
        if options.statistics is None
        else read_latents(options.statistics, source.fingerprint, source.config.latent_channels),
        metrics=read_metrics(options.metrics, source.fingerprint),
        request=None
        if options.data is None
        else data_request(source, options.data, **measuring, device=where),
        device=where,
    )
    record = _finished(Path(options.out), plan) or _make(Path(options.out), plan)
    summary = {
        "out": str(options.out),
        "format": options.format,
        **record["scaling"],
        "files": record["files"],
    }
    return (
        summary
        if options.push_to_hub is None
        else {**summary, "repository": push(Path(options.out), CARD, options.push_to_hub)}
    )


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

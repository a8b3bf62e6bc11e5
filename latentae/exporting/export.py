"""The verb `export`: write a model as a folder that other libraries load.

OUT/ config.json, diffusion_pytorch_model[.fp16].safetensors   diffusers
     config.json, vae.ldm.safetensors                          ldm
     vae_encoder/, vae_decoder/                                onnx
     pt2/                                                      pt2
     latent_statistics.json, latent_preview.json               if measured
     training/                                                 all, of a run
     README.md, latentae.json                                  model card and job record
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from latentae.device import choose_device
from latentae.errors import ModelError, OutputError, RecipeError, first_line
from latentae.exporting.card import CardFacts, card_for_hub, model_card
from latentae.exporting.data_measurements import ImageRequest, measure_component, measure_model
from latentae.exporting.earlier_results import read_latents, read_metrics, read_validation
from latentae.exporting.formats import (
    Exportable,
    ExportableConfig,
    check_finite,
    component_config,
    copy_training_parts,
    ldm_notes,
    write_diffusers,
    write_ldm,
)
from latentae.exporting.options import ExportOptions
from latentae.exporting.scaling import MeasuredLatents, choose_scaling, fold_normalization
from latentae.file_names import RECORD
from latentae.files import sha256, staged_folder, write_json, write_text
from latentae.jobs import Job
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig, build
from latentae.models.pretrained import ModelSource, load_weights, resolve_model
from latentae.options import identity, verb
from latentae.progress import say
from latentae.version import __version__

__all__ = ["export"]

CARD, STATISTICS, PREVIEW = "README.md", "latent_statistics.json", "latent_preview.json"
FORMATS = ("diffusers", "ldm", "onnx", "pt2")


@verb(ExportOptions)
def export(options: ExportOptions) -> dict[str, Any]:
    """Write a model as a component that others load; on any error no folder is left.

    diffusers' AutoencoderDC has no posterior: its latent is the posterior mean.

    Returns:
        `out`, `format`, `scaling_factor`, `shift_factor`, `files`, and the address `repository` if
        it was uploaded.

    Raises:
        RecipeError: an option, or unusable statistics or metrics.
        ModelError: no such model, weights that are not finite, or statistics of another model.
        OutputError: `out` can't be written or holds something else, or the upload failed (run the
            same command again to repeat only the upload).
        MissingDependencyError: a format needs a package that is not installed.
        DataError: `data` can't be read.
    """
    plan, out = _plan(options), Path(options.out)
    record = _finished(out, plan) or _write(out, plan)
    summary = {"out": str(out), "format": options.format, **record["scaling"], "files": record["files"]}
    if options.push_to_hub is not None:
        summary["repository"] = _push(out, options.push_to_hub)
    return summary


@dataclass(frozen=True)
class ExportPlan:
    """An export after all checks, with the earlier results that it uses."""

    options: ExportOptions
    source: ModelSource
    config: ExportableConfig
    """The source's."""
    latents: MeasuredLatents | None
    metrics: dict[str, str] | None
    request: ImageRequest | None
    device: torch.device

    @property
    def factors(self) -> dict[str, float | None]:
        """The given latent scaling."""
        return {
            "scaling_factor": self.options.scaling_factor,
            "shift_factor": self.options.shift_factor,
        }

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats to write; "all" are those that the model's class has."""
        return written_formats(self.options.format, self.config)

    def inputs(self) -> dict[str, Any]:
        """The job's identity, as plain JSON values."""
        values = {
            "model": self.source.fingerprint,
            "resolution": self.source.resolution,
            **identity(self.options),
            "scaling": {**self.factors, "measured": None if self.latents is None else asdict(self.latents)},
            "metrics": self.metrics,
            "data": None if self.request is None else self.request.inputs(),
        }
        return json.loads(json.dumps(values))


def written_formats(format: str, config: ExportableConfig) -> tuple[str, ...]:
    """The formats that `format` stands for; "all" are those that a model of this config has."""
    if format != "all":
        return (format,)
    return tuple(name for name in FORMATS if name != "ldm" or isinstance(config, AutoencoderKLConfig))


def _plan(options: ExportOptions) -> ExportPlan:
    """Check the options against the model and read earlier results, before any work."""
    source, device = resolve_model(options.model, options.weights), choose_device(options.device)
    config = _checked_class(options, source)
    if "onnx" in written_formats(options.format, config):
        from latentae.exporting.programs import require_onnx

        require_onnx()
    return ExportPlan(
        options=options,
        source=source,
        config=config,
        latents=None if options.statistics is None else read_latents(options.statistics, source),
        metrics=read_metrics(options.metrics, source.fingerprint),
        request=ImageRequest.of(options, source, device),
        device=device,
    )


def _checked_class(options: ExportOptions, source: ModelSource) -> ExportableConfig:
    """The model's config, if other libraries have its class and the options suit it."""
    config = source.config
    if not isinstance(config, ExportableConfig):
        raise ModelError(
            f"{options.model} is a {config.class_name}; only AutoencoderKL and AutoencoderDC can be "
            "exported, other libraries have no other class"
        )
    if isinstance(config, AutoencoderKLConfig):
        return config
    if options.format == "ldm":
        raise RecipeError(
            "format ldm has no key names for an AutoencoderDC; use format diffusers, onnx or pt2"
        )
    if options.fold_normalization:
        raise RecipeError(
            "fold_normalization is not possible for an AutoencoderDC: its 3x3 convolutions at the latent "
            "pad with zeros; export without folding"
        )
    if options.shift_factor:
        raise RecipeError(
            f"shift_factor is {options.shift_factor}, but diffusers' AutoencoderDC has none; leave it out"
        )
    return config


def _finished(out: Path, plan: ExportPlan) -> dict[str, Any] | None:
    """The record of this export if it is finished.

    Raises:
        OutputError: the folder holds another export, or a file is missing or has another size.
    """
    if not (out / RECORD).is_file():
        return None
    Job.open(out, "export", plan.inputs())  # refuses the folder of another job
    record = Job.read(out)
    for name, facts in record.get("files", {}).items():
        path = out / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise OutputError(f"{path} is missing or damaged; delete {out} and export again")
    say(f"export: {out} already holds this export; nothing to do")
    return record


def _write(out: Path, plan: ExportPlan) -> dict[str, Any]:
    """Write the folder and return its record."""
    with staged_folder(out) as staging:
        job = Job.open(staging, "export", plan.inputs())
        facts = _write_component(plan, staging, out.name)
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


def _write_component(plan: ExportPlan, folder: Path, name: str) -> CardFacts:
    """Measure, and write every file except the card into `folder`, which will be called `name`."""
    source, request, options = plan.source, plan.request, plan.options
    model = _load(plan)
    figures = None if request is None else measure_model(model, request)
    latents = plan.latents or (None if figures is None else figures.latents)
    scaling = choose_scaling(plan.config, latents, **plan.factors, folded=options.fold_normalization)
    if scaling.folded and latents is not None and isinstance(model, AutoencoderKL):
        model = fold_normalization(model, latents.mean, latents.std)
    audit, tiling = (None, None) if request is None else measure_component(model, request)
    config = component_config(
        _without_channel_statistics(model.config) if latents is not None else model.config,
        resolution=source.resolution,
        scaling_factor=scaling.scaling_factor,
        shift_factor=scaling.shift_factor,
        force_upcast=audit is None or audit.force_upcast,
    )
    write_formats(plan, model.cpu(), config, folder)
    preview = None if figures is None or figures.preview is None else figures.preview.result(scaling)
    if latents is not None:
        found = (scaling.measured or latents).to_json(source.fingerprint)
        write_json(folder / STATISTICS, {**found, "folded_into_the_weights": scaling.folded})
    if preview is not None:
        write_json(folder / PREVIEW, preview.to_json())
    return CardFacts(
        name=name,
        config=config,
        scaling=scaling,
        parameters=sum(p.numel() for p in model.parameters()),
        resolution=source.resolution,
        weights=_weights_in_words(plan),
        version=__version__,
        formats=plan.formats,
        variant=options.variant,
        metrics=plan.metrics or (None if figures else read_validation(source, options.weights)),
        quality=() if figures is None else figures.quality,
        audit=audit,
        tiling=tiling,
        preview=preview,
        ldm_notes=ldm_notes(config)
        if "ldm" in plan.formats and isinstance(config, AutoencoderKLConfig)
        else (),
        training=copy_training_parts(source, folder) if options.format == "all" else {},
    )


def _load(plan: ExportPlan) -> Exportable:
    """The model in evaluation mode on the plan's device; an AutoencoderDC without its posterior."""
    model: Any = build(plan.config)
    load_weights(model, plan.source.weights_file)  # not from source.path: a run may have a newer checkpoint
    model = model if isinstance(model, AutoencoderKL) else model.without_posterior()
    return model.eval().to(plan.device)


def _without_channel_statistics(config: ExportableConfig) -> ExportableConfig:
    """SDXL's pipelines would scale by them in addition to the new factors."""
    if not isinstance(config, AutoencoderKLConfig):
        return config
    return config.model_copy(update={"latents_mean": None, "latents_std": None})


def _weights_in_words(plan: ExportPlan) -> str:
    """Which weights, without paths of this machine."""
    source = plan.source
    if source.kind not in ("run", "checkpoint"):
        return f"as in {source.weights_file.name}"
    which = "EMA" if plan.options.weights == "ema" else "raw (not EMA)"
    return f"{which} weights of a training run, {source.weights_file.parent.name}"


def write_formats(plan: ExportPlan, model: Exportable, config: ExportableConfig, folder: Path) -> None:
    """Write a component in the plan's formats.

    Args:
        plan: formats, variant and device.
        model: in fp32, in evaluation mode, on the CPU.
        config: for pipelines; the model's with the scaling and tile side of the export.
        folder: the export's folder.

    Raises:
        ModelError: a weight is not finite.
        MissingDependencyError: a format needs a package that is not installed.
    """
    variant = plan.options.variant
    check_finite(model.state_dict(), variant)
    if "diffusers" in plan.formats:
        write_diffusers(model, config, folder, variant)
    if "ldm" in plan.formats and isinstance(model, AutoencoderKL) and isinstance(config, AutoencoderKLConfig):
        write_ldm(model, config, folder)
    if "onnx" in plan.formats:
        from latentae.exporting.programs import write_onnx

        write_onnx(model, config, folder)
    if "pt2" in plan.formats:
        from latentae.exporting.programs import write_pt2

        write_pt2(model, config, folder, str(plan.device))


def _push(folder: Path, repository: str) -> str:
    """Upload a finished folder; the snippets of its card get the repository's name.

    A missing repository is created with the account's default visibility. Files that are already
    there are not sent again.

    Returns:
        The repository's address.

    Raises:
        OutputError: not logged in, no write access, or no connection.
    """
    text = card_for_hub((folder / CARD).read_text(encoding="utf-8"), folder.name, repository)
    api = HfApi()
    try:
        address = str(api.create_repo(repository, exist_ok=True))
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=[CARD],
            commit_message="Upload by latentae export",
        )
        api.upload_file(
            repo_id=repository, path_in_repo=CARD, path_or_fileobj=text.encode(), commit_message="Model card"
        )
    except Exception as error:  # of the Hub's client, its transport or the system
        raise OutputError(
            f"could not upload to {repository} ({type(error).__name__}: {first_line(error)}); "
            f"{folder} is complete: "
            "log in with `hf auth login` and run the same command again"
        ) from error
    say(f"export: uploaded {folder} to {address}")
    return address

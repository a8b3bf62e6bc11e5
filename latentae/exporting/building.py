"""From an export as asked for to the files of its folder, and the facts for its card."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentae.exporting.card import CardFacts
from latentae.exporting.diffusers import component_config
from latentae.exporting.figures import DataRequest, measure_component, measure_model
from latentae.exporting.folding import fold_normalization
from latentae.exporting.formats import ALL, Component, write_formats, written_formats
from latentae.exporting.kinds import Exportable, ExportableConfig
from latentae.exporting.ldm_file import ldm_notes
from latentae.exporting.measured import MeasuredLatents, read_validation
from latentae.exporting.scaling import LatentScaling, choose_scaling
from latentae.exporting.training_parts import copy_training_parts
from latentae.files import write_json
from latentae.models.architectures import build as build_network
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig
from latentae.models.pretrained import ModelSource, load_weights
from latentae.version import __version__

if TYPE_CHECKING:
    from latentae.exporting.preview import Preview

__all__ = ["PREVIEW", "STATISTICS", "ExportPlan", "build", "normalised_preview"]

STATISTICS, PREVIEW = "latent_statistics.json", "latent_preview.json"
NO_CHANNELS = {
    "latents_mean": None,
    "latents_std": None,
}  # with them SDXL would scale what the new factors scale already


@dataclass(frozen=True)
class ExportPlan:
    """An export as asked for, checked, with everything read that was measured before."""

    source: ModelSource
    config: ExportableConfig
    """The source's."""
    weights: str
    """Which of a run: "ema" or "raw"."""
    format: str
    variant: str | None
    fold: bool
    factors: dict[str, float | None]
    """`scaling_factor` and `shift_factor` where they were given."""
    latents: MeasuredLatents | None
    metrics: dict[str, str] | None
    request: DataRequest | None
    device: torch.device

    def inputs(self) -> dict[str, Any]:
        """What makes two exports the same, as plain JSON values."""
        values = {
            "model": self.source.fingerprint,
            "resolution": self.source.resolution,
            "format": self.format,
            "variant": self.variant,
            "fold_normalization": self.fold,
            "scaling": {**self.factors, "measured": None if self.latents is None else asdict(self.latents)},
            "metrics": self.metrics,
            "data": None if self.request is None else self.request.inputs(),
        }
        return json.loads(json.dumps(values))


def build(plan: ExportPlan, folder: Path, name: str) -> CardFacts:
    """Measure what is asked for and write every file but the card into `folder`, which will be called `name`."""
    source, request = plan.source, plan.request
    model = _load(plan)
    figures = None if request is None else measure_model(model, request)
    latents = plan.latents or (None if figures is None else figures.latents)
    scaling = choose_scaling(plan.config, latents, **plan.factors, folded=plan.fold)
    component = _folded(model, latents) if scaling.folded and latents is not None else model
    audit, tiling = (None, None) if request is None else measure_component(component, request)
    config = component_config(
        _without_channels(component.config) if latents is not None else component.config,
        resolution=source.resolution,
        scaling_factor=scaling.scaling_factor,
        shift_factor=scaling.shift_factor,
        force_upcast=audit is None or audit.force_upcast,
    )
    write_formats(plan.format, Component(component.cpu(), config, plan.variant, str(plan.device)), folder)
    preview = (
        None if figures is None or figures.preview is None else normalised_preview(figures.preview, scaling)
    )
    if latents is not None:
        found = (scaling.measured or latents).to_json(source.fingerprint)
        write_json(folder / STATISTICS, {**found, "folded_into_the_weights": scaling.folded})
    if preview is not None:
        write_json(folder / PREVIEW, preview.to_json())
    formats = written_formats(plan.format, config)
    return CardFacts(
        name=name,
        config=config,
        scaling=scaling,
        parameters=sum(p.numel() for p in component.parameters()),
        resolution=source.resolution,
        weights=_in_words(plan),
        version=__version__,
        formats=formats,
        variant=plan.variant,
        metrics=plan.metrics or (None if figures else read_validation(source, plan.weights)),
        quality=() if figures is None else figures.quality,
        audit=audit,
        tiling=tiling,
        preview=preview,
        ldm_notes=ldm_notes(config) if "ldm" in formats and isinstance(config, AutoencoderKLConfig) else (),
        training=copy_training_parts(source, folder) if plan.format == ALL else {},
    )


def _load(plan: ExportPlan) -> Exportable:
    """The model in evaluation mode where it is measured; of a posterior that others' class has not, the mean."""
    model: Any = build_network(plan.config)
    load_weights(model, plan.source.weights_file)  # not by source.path: a run may have moved on
    model = model if isinstance(model, AutoencoderKL) else model.without_posterior()
    return model.eval().to(plan.device)


def _folded(model: Exportable, latents: MeasuredLatents) -> Exportable:
    assert isinstance(model, AutoencoderKL)  # others were refused
    return fold_normalization(model, latents.mean, latents.std)


def _without_channels(config: ExportableConfig) -> ExportableConfig:
    return config.model_copy(update=NO_CHANNELS) if isinstance(config, AutoencoderKLConfig) else config


def _in_words(plan: ExportPlan) -> str:
    """Which weights, without this machine's paths."""
    source = plan.source
    if source.kind in ("run", "checkpoint"):
        return f"{'EMA' if plan.weights == 'ema' else 'raw (not EMA)'} weights of a training run, {source.weights_file.parent.name}"
    return f"as in {source.weights_file.name}"


def normalised_preview(preview: Preview, scaling: LatentScaling) -> Preview:
    """A preview of raw latents as one of normalised ones, the n of raw = n * std + mean (or n / scaling_factor + shift_factor).

    Least squares from any affine map of the latents to the same images is the same fit, so it needs no second look at the data.
    """
    z = len(preview.factors)
    if scaling.folded and scaling.measured is not None:
        std, mean = scaling.measured.std, scaling.measured.mean
    else:
        std, mean = (1 / scaling.scaling_factor,) * z, (scaling.shift_factor,) * z
    rows = zip(preview.factors, std, strict=True)
    factors = tuple((red * s, green * s, blue * s) for (red, green, blue), s in rows)
    red, green, blue = (
        b + sum(row[k] * m for row, m in zip(preview.factors, mean, strict=True))
        for k, b in enumerate(preview.bias)
    )
    scale = {"scaling_factor": scaling.scaling_factor, "shift_factor": scaling.shift_factor}
    return replace(preview, factors=factors, bias=(red, green, blue), **scale)

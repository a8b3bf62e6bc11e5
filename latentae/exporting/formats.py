"""One writer a format; `all` is every one that a model of its kind can have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latentae.errors import RecipeError
from latentae.exporting.diffusers import VARIANTS, check_finite, write_diffusers
from latentae.exporting.kinds import Exportable, ExportableConfig
from latentae.exporting.ldm_file import write_ldm
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderConfig, AutoencoderKLConfig

__all__ = ["ALL", "FORMATS", "Component", "check_format", "write_formats", "written_formats"]


@dataclass(frozen=True)
class Component:
    """What every writer is given."""

    model: Exportable
    """In fp32, in evaluation mode, on a CPU."""
    config: ExportableConfig
    """What pipelines read; `model.config` with the scaling and tile side of the export."""
    variant: str | None
    device: str
    """What a compiled package is compiled for."""


def _diffusers(component: Component, folder: Path) -> None:
    write_diffusers(component.model, component.config, folder, component.variant)


def _ldm(component: Component, folder: Path) -> None:
    assert isinstance(component.model, AutoencoderKL)
    assert isinstance(component.config, AutoencoderKLConfig)
    write_ldm(component.model, component.config, folder)


def _onnx(component: Component, folder: Path) -> None:
    from latentae.exporting.onnx_folders import write_onnx

    write_onnx(component.model, component.config, folder)


def _pt2(component: Component, folder: Path) -> None:
    from latentae.exporting.pt2 import write_pt2

    write_pt2(component.model, component.config, folder, component.device)


WRITERS: dict[str, Callable[[Component, Path], None]] = {
    "diffusers": _diffusers,
    "ldm": _ldm,
    "onnx": _onnx,
    "pt2": _pt2,
}
ALL = "all"
FORMATS = (*WRITERS, ALL)


def check_format(format: str, variant: str | None) -> None:
    """Refuse a format or variant that there is not, a variant that the format would not hold, and a format whose packages are missing.

    Raises:
        RecipeError, MissingDependencyError: see above.
    """
    if format not in FORMATS:
        raise RecipeError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    if variant is not None and variant not in VARIANTS:
        raise RecipeError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
    if variant is not None and "diffusers" not in written_formats(format):
        raise RecipeError(f"format {format} has no variants; variant {variant} is for diffusers or all")
    if "onnx" in written_formats(format):
        from latentae.exporting.onnx_folders import require_onnx

        require_onnx()


def written_formats(format: str, config: AutoencoderConfig | None = None) -> tuple[str, ...]:
    """The formats that `format` stands for, for a model of this config: "all" are those that its kind has."""
    if format != ALL:
        return (format,)
    no_ldm = config is not None and not isinstance(config, AutoencoderKLConfig)
    return tuple(name for name in WRITERS if name != "ldm" or not no_ldm)


def write_formats(format: str, component: Component, folder: Path) -> None:
    """Write a component in a format, or in all.

    Raises:
        ModelError: a weight is not finite.
        MissingDependencyError: a package that a format needs is not installed.
    """
    check_finite(component.model.state_dict(), component.variant)
    for name in written_formats(format, component.config):
        WRITERS[name](component, folder)

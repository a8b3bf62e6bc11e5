"""The kinds of model that others can load, and what an export of each can't have."""

from __future__ import annotations

from latentae.errors import ModelError, RecipeError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderConfig, AutoencoderDCConfig, AutoencoderKLConfig
from latentae.models.dc.autoencoder import AutoencoderDC

__all__ = ["Exportable", "ExportableConfig", "check_kind", "exportable"]

Exportable = AutoencoderKL | AutoencoderDC
ExportableConfig = AutoencoderKLConfig | AutoencoderDCConfig


def exportable(config: AutoencoderConfig, model: str) -> ExportableConfig:
    """`config`, if others have the class.

    Raises:
        ModelError: they have not; `model` is named.
    """
    if not isinstance(config, ExportableConfig):
        raise ModelError(
            f"{model} is a {config.class_name}; what others load is an AutoencoderKL or an AutoencoderDC, so only these are exported"
        )
    return config


def check_kind(config: ExportableConfig, format: str, folded: bool, shift_factor: float | None) -> None:
    """Refuse what an export of this kind can't have, before any work.

    Raises:
        RecipeError: a format, folding or a shift that an AutoencoderDC does not know.
    """
    if isinstance(config, AutoencoderKLConfig):
        return
    if format == "ldm":
        raise RecipeError(
            "format ldm has LDM's names for an AutoencoderKL, and none for an AutoencoderDC; take diffusers, onnx or pt2"
        )
    if folded:
        raise RecipeError(
            "an AutoencoderDC's latent meets a 3x3 convolution, at whose padded border a mean can't be folded into its weights; export "
            "without folding"
        )
    if shift_factor:
        raise RecipeError(
            f"shift factor is {shift_factor}, but diffusers' AutoencoderDC has none; leave it out"
        )

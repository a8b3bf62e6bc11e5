"""Options of the verb `export`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import model_validator

from latentae.data.options import MODEL, ImageOptions
from latentae.options import KW_ONLY, Inputs, PathLike, PerceptualName, argument, option, table

__all__ = ["ExportOptions"]


@table
class ExportOptions(ImageOptions):
    """Write a model as a component that other libraries load.

    These are diffusers, ONNX Runtime, torch and readers of LDM files. The folder has a model card.
    """

    model: PathLike = argument(MODEL)
    out: PathLike = argument("Folder to write.")
    _: KW_ONLY
    format: Literal["diffusers", "ldm", "onnx", "pt2", "all"] = option(
        "Output format: diffusers, ldm (one file with LDM's key names), onnx, pt2 (AOTInductor) or all.",
        default="diffusers",
        identity=True,
    )
    variant: Literal["fp16", "bf16"] | None = option(
        "Also write half-precision weights.", default=None, identity=True
    )
    fold_normalization: bool = option(
        "Normalize latents inside the weights, so that scaling is 1 and shift is 0.",
        default=False,
        identity=True,
    )
    scaling_factor: float | None = option(
        "Latent scaling; defaults to the measured value, or else the config's.",
        default=None,
        gt=0,
        allow_inf_nan=False,
    )
    shift_factor: float | None = option(
        "Latent shift; defaults to the measured value, or else the config's.",
        default=None,
        allow_inf_nan=False,
    )
    statistics: PathLike | None = option(
        "Output folder of encode or evaluate, to take the latent scaling from.", default=None
    )
    metrics: Mapping[str, Any] | PathLike | None = option(
        "Output folder of evaluate, for the model card.", default=None
    )
    data: Inputs | None = option(
        "Shards for measuring quality, latent statistics, half precision and tiling.",
        default=None,
        metavar="SHARDS",
    )
    images: int = option("Maximum number of images to measure on.", default=256, ge=1)
    resolution: int | Sequence[int] | None = option(
        "Image side in pixels for measuring; repeat for several. Defaults to the model's resolution.",
        default=None,
        many=True,
    )
    batch_size: int = option("Images per batch when measuring.", default=8, ge=1)
    perceptual: PerceptualName = option("Network of the perceptual distance.", default="auto")
    push_to_hub: str | None = option(
        "Upload the folder to this repository on the Hugging Face Hub.",
        default=None,
        metavar="OWNER/NAME",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*$",
    )

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        if self.variant is not None and self.format not in ("diffusers", "all"):
            raise ValueError(
                f"format {self.format} has no variants; variant {self.variant} needs format diffusers or all"
            )
        if not self.fold_normalization:
            return self
        if self.scaling_factor is not None or self.shift_factor is not None:
            raise ValueError(
                "fold_normalization uses the measured statistics; "
                "leave out scaling_factor and shift_factor, or do not fold"
            )
        if self.statistics is None and self.data is None:
            raise ValueError(
                "fold_normalization needs the statistics of the latents; "
                "give statistics (a folder of encode or evaluate) or data"
            )
        return self

"""Options of the verb `export`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from latentae.data.options import MODEL, ImageOptions
from latentae.measures.options import PerceptualName
from latentae.options import KW_ONLY, Inputs, PathLike, argument, option, table

__all__ = ["ExportOptions"]


@table
class ExportOptions(ImageOptions):
    """Write a model and its card as a component that diffusers, ONNX Runtime, torch or LDM readers load."""

    model: PathLike = argument(MODEL)
    out: PathLike = argument("Folder to write.")
    _: KW_ONLY
    format: Literal["diffusers", "ldm", "onnx", "pt2", "all"] = option(
        "diffusers; ldm (one file under LDM's names); onnx; pt2 (AOTInductor); or all.", default="diffusers"
    )
    fold_normalization: bool = option(
        "Normalize latents inside the weights, so that scaling is 1 and shift is 0.", default=False
    )
    variant: Literal["fp16", "bf16"] | None = option("Also write half-precision weights.", default=None)
    scaling_factor: float | None = option(
        "Latent scaling; defaults to the measured one or the config's.", default=None
    )
    shift_factor: float | None = option(
        "Latent shift; defaults to the measured one or the config's.", default=None
    )
    statistics: PathLike | None = option(
        "Output folder of encode or evaluate, for measured factors.", default=None
    )
    metrics: Mapping[str, Any] | PathLike | None = option(
        "Output folder of evaluate, for the model card.", default=None
    )
    data: Inputs | None = option(
        "Shards to measure on: quality, latents, previews, half precision and tiling.",
        default=None,
        metavar="SHARDS",
    )
    images: int = option("Maximum number of images of the data.", default=256)
    resolution: int | Sequence[int] | None = option(
        "Image side in pixels to measure at; repeat it for more. Defaults to the model's own.",
        default=None,
        many=True,
    )
    batch_size: int = option("Images per batch when measuring.", default=8)
    perceptual: PerceptualName = option("Network of the perceptual distance.", default="auto")
    push_to_hub: str | None = option(
        "Upload the folder to this repository on the Hugging Face Hub.", default=None, metavar="OWNER/NAME"
    )

"""Options of the tasks: features, anomaly, denoise, interpolate and sample."""

from __future__ import annotations

from typing import Literal

from latentae.data.options import IMAGES, MODEL, ImageOptions
from latentae.keyed import AnySeed
from latentae.options import KW_ONLY, Inputs, PathLike, PerceptualName, argument, option, table

__all__ = [
    "AnomalyOptions",
    "DenoiseOptions",
    "FeaturesOptions",
    "InterpolateOptions",
    "SampleOptions",
    "TaskOptions",
]

_LABELS = (
    "auto (the image's .cls file), folder (first folder of its key), none, "
    "or a CSV file with the columns key and label."
)
_MODEL_SIDE = "Image side in pixels; defaults to the model's resolution."


@table
class _FolderOptions(ImageOptions):
    """Options of every task that fills a folder from images."""

    _: KW_ONLY
    resolution: int | None = option(
        "Side of the center crop in pixels. By default images keep their shape, at most 1024 pixels.",
        default=None,
        identity=True,
    )
    batch_size: int = option("Images per batch; affects speed and memory only.", default=16, ge=1)


@table
class FeaturesOptions(_FolderOptions):
    """Write latents as features. Labels add a probe. Run the same command again to resume."""

    model: PathLike = argument(MODEL)
    inputs: Inputs = argument(IMAGES, many=True)
    out: PathLike = argument("Output folder.", default="features")
    _: KW_ONLY
    pool: Literal["mean", "moments", "spatial"] = option(
        "mean over all positions; moments (mean and standard deviation); or spatial, the latent itself.",
        default="mean",
        identity=True,
    )
    format: Literal["safetensors", "npz"] = option(
        "File format of the features.", default="safetensors", identity=True
    )
    labels: PathLike = option(_LABELS, default="auto", identity=True)


@table
class AnomalyOptions(_FolderOptions):
    """Score how much images differ from normal ones. Run the same command again to resume."""

    model: PathLike = argument(MODEL)
    normal: Inputs = argument("Normal images that the model was not trained on: a folder, a file or shards.")
    inputs: Inputs = argument(IMAGES, many=True)
    out: PathLike = argument("Output folder.", default="anomaly")
    _: KW_ONLY
    quantile: float = option(
        "Share of normal images below the threshold.", default=0.95, gt=0, lt=1, identity=True
    )
    score: Literal["error", "peak", "latent", "perceptual", "combined"] = option(
        "Score that is compared with the threshold.", default="error", identity=True
    )
    perceptual: PerceptualName = option("Network of the perceptual score.", default="none", identity=True)
    labels: PathLike = option(_LABELS, default="auto")
    heat_maps: int = option(
        "Maximum number of heat maps, for the highest scores.", default=32, ge=0, identity=True
    )
    seed: AnySeed = option("Random seed of the split of the normal images.", default=0, identity=True)


@table
class DenoiseOptions(_FolderOptions):
    """Write reconstructions of noisy images. Run the same command again to resume."""

    model: PathLike = argument(MODEL)
    inputs: Inputs = argument(IMAGES, many=True)
    out: PathLike = argument("Output folder.", default="denoised")
    _: KW_ONLY
    noise: float = option(
        "Add Gaussian noise of this standard deviation (range [-1, 1]) and measure the gain in PSNR.",
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        identity=True,
    )
    seed: AnySeed = option("Random seed of the noise.", default=0, identity=True)


@table
class InterpolateOptions(ImageOptions):
    """Decode latents between those of two images to one picture."""

    model: PathLike = argument(MODEL)
    a: PathLike = argument("First image file.")
    b: PathLike = argument("Last image file.")
    out: PathLike = argument("PNG to write.", default="strip.png")
    _: KW_ONLY
    steps: int = option("Number of images, including both ends.", default=9, ge=2)
    mode: Literal["linear", "spherical"] = option("Path between the latents.", default="linear")
    resolution: int | None = option(_MODEL_SIDE, default=None)


@table
class SampleOptions(ImageOptions):
    """Decode random latents to one picture. Their source is the prior or a fitted Gaussian."""

    model: PathLike = argument(MODEL)
    out: PathLike = argument("PNG to write.", default="samples.png")
    _: KW_ONLY
    count: int = option("Number of images.", default=16, ge=1)
    seed: AnySeed = option("Random seed of the latents.", default=0)
    latents: Inputs | None = option(
        "Output folder of encode, or images: sample a Gaussian fitted to their latents, not the prior.",
        default=None,
    )
    resolution: int | None = option(_MODEL_SIDE, default=None)
    batch_size: int = option("Images per batch.", default=16, ge=1)


TaskOptions = FeaturesOptions | AnomalyOptions | DenoiseOptions | InterpolateOptions | SampleOptions

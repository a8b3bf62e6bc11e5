"""Options of the verbs that measure: evaluate, compare and reconstruct."""

from __future__ import annotations

from collections.abc import Sequence

from latentae.data.headers import MAX_PIXELS
from latentae.data.options import MAX_PIXELS_HELP, MODEL, SHARDS, ImageOptions
from latentae.keyed import Seed
from latentae.options import KW_ONLY, Inputs, PathLike, PerceptualName, argument, option, table

__all__ = ["CompareOptions", "EvaluateOptions", "ReconstructOptions"]


@table
class EvaluateOptions(ImageOptions):
    """Measure reconstructions and latents on held-out shards. Adds baselines and an HTML report."""

    model: PathLike = argument(MODEL)
    shards: Inputs = argument(SHARDS)
    _: KW_ONLY
    compare: Sequence[PathLike] | None = option(
        "Another model to measure on the same images; repeat it for more.",
        default=None,
        metavar="MODEL",
        many=True,
    )
    out: PathLike | None = option(
        "Folder for metrics.json, per_image.csv and report.html. By default a table is printed.", default=None
    )
    resolution: int | None = option(
        "Image side in pixels; defaults to the model's own.", default=None, identity=True
    )
    batch_size: int = option("Images per batch; affects speed and memory only.", default=8, ge=1)
    limit: int | None = option(
        "Maximum number of images, spread evenly over the shards.", default=None, ge=1, identity=True
    )
    perceptual: PerceptualName = option(
        "Network of the perceptual distance; auto takes the best whose weights are on this machine.",
        default="auto",
        identity=True,
    )
    frechet: str = option(
        "Features of the Frechet distance: auto, inception, none, or a backbone of timm.",
        default="auto",
        identity=True,
    )
    details: bool = option(
        "Also measure disturbed latents, half precision, rate and distortion on a few images.",
        default=True,
        identity=True,
    )
    diffusability: bool = option(
        "Also interpolate latents and train tiny flows on them; takes minutes.", default=False, identity=True
    )
    pca_shards: Inputs | None = option(
        "Images to fit the PCA and DCT baselines on; defaults to the run's training images.",
        default=None,
        identity=True,
    )
    seed: Seed = option("Random seed of the bootstrap, the noise and the flows.", default=0, identity=True)
    max_pixels: int = option(MAX_PIXELS_HELP, default=MAX_PIXELS, ge=1, identity="changed")


@table
class CompareOptions:
    """Compare runs on one HTML page. It has their recipes' differences, curves and metrics."""

    runs: Sequence[PathLike] = argument(
        "Run folders, or output folders of evaluate.", metavar="RUN RUN...", many=True
    )
    out: PathLike = argument("HTML page to write.", default="compare.html")


@table
class ReconstructOptions(ImageOptions):
    """Write images and their reconstructions as one picture. Also prints the PSNR of each."""

    model: PathLike = argument(MODEL)
    images: Sequence[PathLike] = argument("Image files.", metavar="IMAGE...", many=True)
    _: KW_ONLY
    out: PathLike = option("PNG to write.", default="grid.png")
    resolution: int | None = option(
        "Resize the short side to this many pixels and crop; defaults to each image's own size.", default=None
    )

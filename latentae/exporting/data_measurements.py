"""What export measures on `data`: quality, latent statistics, preview, half precision and tiling.

Quality, statistics and preview come from one pass over the images per resolution, with the trained
model. Half precision and tiling are measured on the component that is written, which may have a
folded normalization. Memory holds one batch, and one row of numbers per image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentae.data.loader import Batch, image_batches
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import ShardIndex, load_index
from latentae.data.transforms import to_float, to_uint8
from latentae.errors import ModelError, RecipeError
from latentae.exporting.options import ExportOptions
from latentae.exporting.preview import PreviewFit
from latentae.exporting.scaling import MeasuredLatents
from latentae.measures.latents.report import LatentReport
from latentae.measures.metrics import TAPS, check_finite, psnr, ssim
from latentae.measures.perceptual_distance import Distance, choose_distance
from latentae.measures.scores import Scores
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.base import Autoencoder
from latentae.models.pretrained import ModelSource
from latentae.models.tiling import Tiled
from latentae.progress import Progress

if TYPE_CHECKING:
    from latentae.measures.latents.half import HalfAudit

__all__ = ["Figures", "ImageRequest", "Quality", "TilingError", "measure_component", "measure_model"]

TILED_IMAGES = 4  # enough to show the size of the error; each is decoded twice
OVERLAP = 0.25


@dataclass(frozen=True)
class ImageRequest:
    """The images to measure on."""

    options: ExportOptions
    index: ShardIndex
    resolutions: tuple[int, ...]
    """Image sides in pixels; latents and previews are measured at the first."""
    channels: int
    device: torch.device

    @classmethod
    def of(cls, options: ExportOptions, source: ModelSource, device: torch.device) -> ImageRequest | None:
        """The images of `options.data`, checked against the model; None without data.

        Raises:
            ImageError: a resolution that is not a multiple of f.
            ModelError: a model of other than 1, 3 or 4 channels, or not the same in and out.
            ShardError: no shards, or damaged ones.
        """
        if options.data is None:
            return None
        source.check_channels()
        sizes = [options.resolution] if isinstance(options.resolution, int) else options.resolution
        sizes = tuple(sizes or (source.resolution,))
        for size in sizes:
            source.check_side(size)
        index = load_index(expand_shards(options.data))
        return cls(options, index, sizes, source.config.in_channels, device)

    @property
    def total(self) -> int:
        """Number of images that are read."""
        return min(self.options.images, self.index.samples)

    def inputs(self) -> dict[str, Any]:
        """Everything the results depend on, for the job's identity."""
        return {
            "shards": self.index.digest,
            "images": self.options.images,
            "resolutions": list(self.resolutions),
            "perceptual": self.options.perceptual,
        }

    def batches(self, resolution: int, limit: int | None = None) -> Iterator[Batch]:
        """The first images in shard order, at one resolution."""
        return image_batches(
            [entry.path for entry in self.index.shards],
            resolution,
            self.options.batch_size,
            limit=min(limit or self.options.images, self.options.images),
            channels=self.channels,
            max_pixels=self.options.max_pixels,
        )


@dataclass(frozen=True)
class Quality:
    """Reconstruction quality at one resolution."""

    resolution: int
    images: int
    metrics: dict[str, Any]
    """Per name: mean, 95 % interval and count, as in evaluate's metrics.json."""
    perceptual: str | None
    """The network of the metric "perceptual", if it is measured."""


@dataclass(frozen=True)
class Figures:
    """Results of `measure_model`."""

    quality: tuple[Quality, ...]
    latents: MeasuredLatents
    preview: PreviewFit | None
    """None if images are not RGB."""


@dataclass(frozen=True)
class TilingError:
    """Difference of blended tiles to no tiling, encoder and decoder together."""

    resolution: int
    tile: int
    images: int
    largest: float
    """Largest absolute difference, range [-1, 1]."""
    psnr: float | None
    """In dB, over all images, before rounding, peak 2; None if both reconstructions are equal."""


@torch.inference_mode()
def measure_model(model: Autoencoder, request: ImageRequest) -> Figures:
    """Reconstruct the images from the posterior mean at every resolution.

    Args:
        model: in evaluation mode, on the request's device.
        request: images to measure on.

    Raises:
        ModelError: latents or reconstructions are not finite, or latents do not vary.
    """
    latents = LatentReport()
    preview = PreviewFit(model.config.latent_channels) if request.channels == 3 else None
    quality = []
    for resolution in request.resolutions:
        first, distance = not quality, _distance(request, resolution)
        scores = Scores()
        with Progress(f"measuring at {resolution} px", request.total) as progress:
            for batch in request.batches(resolution):
                source = batch.images.to(request.device)
                images = to_float(source)
                posterior = model.encode(images)
                decoded = model.decode(posterior.mode())
                check_finite("reconstruction", batch.keys, decoded)
                _score(scores, source, to_uint8(decoded), distance)
                if first:
                    latents.add(posterior)
                    if preview is not None:
                        preview.add(posterior.mode(), images)
                progress.advance(len(batch.keys))
        quality.append(Quality(resolution, len(scores.values["psnr"]), scores.summary(seed=0), distance.name))
    return Figures(tuple(quality), _measured(latents), preview)


def _distance(request: ImageRequest, resolution: int) -> Distance:
    if request.channels != 3:
        return Distance(None, None, "the networks of perceptual distances see RGB")
    return choose_distance(request.options.perceptual, resolution, request.device)


def _score(scores: Scores, source: Tensor, decoded: Tensor, distance: Distance) -> None:
    scores.add("psnr", psnr(decoded, source))
    if min(source.shape[2:]) >= TAPS:
        scores.add("ssim", ssim(decoded, source))
    if distance.module is not None:
        scores.add("perceptual", distance(decoded, source))


def _measured(report: LatentReport) -> MeasuredLatents:
    if report.statistics is None:
        raise ModelError("the shards contain no image; give shards with images as data")
    summary = report.statistics.summary()
    if summary["scaling_factor"] is None:
        raise ModelError(
            "the latents of all images are the same; the model has collapsed, export another one"
        )
    mean, std = tuple(summary["latents_mean"]), tuple(summary["latents_std"])
    return MeasuredLatents(
        summary["scaling_factor"], summary["shift_factor"], mean, std, images=summary["samples"]
    )


def measure_component(model: Autoencoder, request: ImageRequest) -> tuple[HalfAudit, TilingError | None]:
    """Half precision at the first resolution, on all images, and tiling at the largest, on a few.

    Args:
        model: the component that will be written, in evaluation mode, on the request's device.
        request: images to measure on.
    """
    from latentae.measures.latents.half import audit_half

    batches = request.batches(request.resolutions[0])
    audit = audit_half(model, (to_float(batch.images.to(request.device)) for batch in batches))
    return audit, _tiling_error(model, request)


@torch.inference_mode()
def _tiling_error(model: Autoencoder, request: ImageRequest) -> TilingError | None:
    """Compare blended tiles of half the side with no tiling; None if they do not fit."""
    if not isinstance(model, AutoencoderKL):
        return None
    f, side = model.config.downsampling, max(request.resolutions)
    tile = side // (2 * f) * f
    try:
        tiled = Tiled(model, "blended", tile=tile, overlap=OVERLAP)
    except RecipeError:  # the tile is too small
        return None
    images, largest, squares, count = 0, 0.0, 0.0, 0
    for batch in request.batches(side, TILED_IMAGES):
        x = to_float(batch.images.to(request.device))
        difference = (tiled.decode(tiled.encode(x).mode()) - model.decode(model.encode(x).mode())).double()
        images, largest = images + len(x), max(largest, float(difference.abs().max()))
        squares, count = squares + float(difference.square().sum()), count + difference.numel()
    return TilingError(side, tile, images, largest, 10 * math.log10(4 * count / squares) if squares else None)

"""What an export measures on images that it is given: quality, latent statistics, previews; then half precision and tiling.

Quality, statistics and previews come from one pass over the data at each resolution, with the model as it was trained. Half precision
and tiling are properties of the component that is written, which may have a normalisation folded in, so they are measured on that.
Memory holds a batch, and a row of numbers for each image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentae.data.headers import MAX_PIXELS
from latentae.data.loader import Batch, image_batches
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import ShardIndex, load_index
from latentae.data.transforms import to_float, to_uint8
from latentae.errors import ModelError, RecipeError
from latentae.exporting.measured import MeasuredLatents
from latentae.measures.latents.report import LatentReport
from latentae.measures.metrics import TAPS, psnr, ssim
from latentae.measures.perceptual_distance import Distance, choose_distance
from latentae.measures.scores import Scores
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.base import Autoencoder
from latentae.models.pretrained import ModelSource
from latentae.progress import Progress

if TYPE_CHECKING:
    from latentae.exporting.preview import Preview
    from latentae.measures.latents.half import HalfAudit

__all__ = [
    "DataRequest",
    "Figures",
    "Quality",
    "TilingError",
    "data_request",
    "measure_component",
    "measure_model",
]

TILED_IMAGES = 4  # enough to show the size of the error; each is decoded twice
OVERLAP = 0.25


@dataclass(frozen=True)
class DataRequest:
    """What to measure on."""

    index: ShardIndex
    resolutions: tuple[int, ...]
    """Image sides in pixels; latents and previews are measured at the first."""
    images: int
    """At most so many, the first in shard order."""
    channels: int
    batch_size: int
    perceptual: str
    device: torch.device
    max_pixels: int = MAX_PIXELS

    @property
    def total(self) -> int:
        """Images that will be seen."""
        return min(self.images, self.index.samples)

    def inputs(self) -> dict[str, Any]:
        """What the figures depend on, as plain JSON values."""
        return {
            "shards": self.index.digest,
            "images": self.images,
            "resolutions": list(self.resolutions),
            "perceptual": self.perceptual,
        }

    def batches(self, resolution: int, limit: int | None = None) -> Iterator[Batch]:
        """The images at one resolution."""
        paths, count = (
            [entry.path for entry in self.index.shards],
            self.images if limit is None else min(limit, self.images),
        )
        options: dict[str, Any] = {"channels": self.channels, "max_pixels": self.max_pixels}
        return image_batches(paths, resolution, self.batch_size, limit=count, **options)


@dataclass(frozen=True)
class Quality:
    """How well images of one size are reconstructed."""

    resolution: int
    images: int
    metrics: dict[str, Any]
    """By name: mean, 95 % interval and count, as in evaluate's metrics.json."""
    perceptual: str | None
    """What "perceptual" is, if it is among the metrics."""


@dataclass(frozen=True)
class Figures:
    """What one look at the data gave."""

    quality: tuple[Quality, ...]
    latents: MeasuredLatents
    preview: Preview | None
    """Of raw latents; None where images are not RGB."""


@dataclass(frozen=True)
class TilingError:
    """Blended tiles against the whole image, encoder and decoder together."""

    resolution: int
    tile: int
    images: int
    largest: float
    """In units of [-1, 1]."""
    psnr: float | None
    """In dB, over all images, of the two reconstructions before rounding, peak to peak 2; None where they are equal."""


def data_request(
    source: ModelSource,
    shards: str | Path | Sequence[str | Path],
    *,
    resolutions: Sequence[int] | None,
    images: int,
    batch_size: int,
    perceptual: str,
    device: torch.device,
    max_pixels: int = MAX_PIXELS,
) -> DataRequest:
    """Check what is asked for against the model, before any work.

    Raises:
        RecipeError: a count below 1.
        ImageError: a resolution that the model can't take.
        ModelError: a model of other than 1, 3 or 4 channels, the same in and out.
        ShardError: no shards, or damaged ones.
    """
    if batch_size < 1 or images < 1:
        raise RecipeError(f"batch_size is {batch_size} and images is {images}; both must be at least 1")
    source.check_channels()
    sizes = tuple(resolutions or (source.resolution,))
    for size in sizes:
        source.check_side(size)
    index = load_index(expand_shards(shards))
    return DataRequest(
        index, sizes, images, source.config.in_channels, batch_size, perceptual, device, max_pixels
    )


@torch.inference_mode()
def measure_model(model: Autoencoder, request: DataRequest) -> Figures:
    """Reconstruct the images from the posterior mean, at every resolution.

    Args:
        model: in evaluation mode, on the request's device.
        request: what to measure on.

    Raises:
        ModelError: latents or reconstructions are not finite, or latents that do not vary.
    """
    from latentae.exporting.preview import PreviewFit

    latents, fit = (
        LatentReport(),
        PreviewFit(model.config.latent_channels, 1.0, 0.0) if request.channels == 3 else None,
    )
    quality = []
    for number, resolution in enumerate(request.resolutions):
        first, distance = number == 0, _distance(request, resolution)
        scores = Scores()
        with Progress(f"measuring at {resolution} px", request.total) as progress:
            for batch in request.batches(resolution):
                source = batch.images.to(request.device)
                images = to_float(source)
                posterior = model.encode(images)
                made = _finite(model.decode(posterior.mode()), batch)
                _score(scores, source, to_uint8(made), distance)
                if first:
                    latents.add(posterior)
                    if fit is not None:
                        fit.add(posterior.mode(), images)
                progress.advance(len(batch.keys))
        quality.append(Quality(resolution, len(scores.values["psnr"]), scores.summary(seed=0), distance.name))
    return Figures(tuple(quality), _measured(latents), None if fit is None else fit.result())


def _distance(request: DataRequest, resolution: int) -> Distance:
    if request.channels != 3:
        return Distance(None, None, "the networks of perceptual distances see RGB")
    return choose_distance(request.perceptual, resolution, request.device)


def _finite(made: Tensor, batch: Batch) -> Tensor:
    bad = ~made.isfinite().flatten(1).all(1)
    if bad.any():
        key = batch.keys[int(bad.nonzero()[0])].encode("utf-8", "backslashreplace").decode()
        raise ModelError(
            f"the reconstruction of {key} has NaN or infinite values; the model has diverged, export an earlier one"
        )
    return made


def _score(scores: Scores, source: Tensor, made: Tensor, distance: Distance) -> None:
    scores.add("psnr", psnr(made, source))
    if min(source.shape[2:]) >= TAPS:
        scores.add("ssim", ssim(made, source))
    if distance.module is not None:
        scores.add("perceptual", distance(made, source))


def _measured(report: LatentReport) -> MeasuredLatents:
    if report.statistics is None:
        raise ModelError("the shards hold no image; give shards with images as data")
    summary = report.statistics.summary()
    if summary["scaling_factor"] is None:
        raise ModelError(
            "the latents of all images are the same; the model has collapsed, export another one"
        )
    mean, std = summary["latents_mean"], summary["latents_std"]
    return MeasuredLatents(
        summary["scaling_factor"], summary["shift_factor"], tuple(mean), tuple(std), summary["samples"]
    )


def measure_component(model: Autoencoder, request: DataRequest) -> tuple[HalfAudit, TilingError | None]:
    """Half precision over all images at the first resolution, and tiling on a few at the largest; None where that can't be done.

    Args:
        model: the component as it will be written, in evaluation mode, on the request's device.
        request: what to measure on.
    """
    from latentae.measures.latents.half import audit_half

    audit = audit_half(
        model,
        (to_float(batch.images.to(request.device)) for batch in request.batches(request.resolutions[0])),
    )
    return audit, tiling_error(model, request)


@torch.inference_mode()
def tiling_error(model: Autoencoder, request: DataRequest) -> TilingError | None:
    """Blended tiles of half the side against none, on the first images at the largest resolution.

    None where a tile would be too small to be one, or the model is of a kind that has no tiling.
    """
    from latentae.models.tiling import Tiled

    if not isinstance(model, AutoencoderKL):
        return None
    f, side = model.config.downsampling, max(request.resolutions)
    tile = side // (2 * f) * f
    try:
        tiled = Tiled(model, "blended", tile=tile, overlap=OVERLAP)
    except RecipeError:
        return None
    images, largest, squares, count = 0, 0.0, 0.0, 0
    for batch in request.batches(side, TILED_IMAGES):
        x = to_float(batch.images.to(request.device))
        difference = (tiled.decode(tiled.encode(x).mode()) - model.decode(model.encode(x).mode())).double()
        images, largest = images + len(x), max(largest, float(difference.abs().max()))
        squares, count = squares + float(difference.square().sum()), count + difference.numel()
    return TilingError(side, tile, images, largest, 10 * math.log10(4 * count / squares) if squares else None)

"""One streaming pass over images: the model, its quantised latents and the baselines, one value per image and metric."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentae.data.loader import Batch
from latentae.data.transforms import to_float, to_uint8
from latentae.errors import ModelError
from latentae.evaluation.baselines import compress_latent, decompress_latent, jpeg_within
from latentae.evaluation.distance import Distance
from latentae.evaluation.latent_report import LatentReport
from latentae.evaluation.metrics import TAPS, psnr, ssim
from latentae.evaluation.summary import Scores
from latentae.models.base import Autoencoder
from latentae.models.pca import PatchPCA
from latentae.progress import Progress

__all__ = ["JPEG", "MODEL", "PCA", "QUANTISED", "Example", "Measurement", "measure"]

MODEL, QUANTISED, PCA, JPEG = "model", "latent_8bit", "pca", "jpeg"
MISSING = math.nan


@dataclass(frozen=True)
class Example:
    """One image and what each method made of it: uint8 [3, H, W] and PSNR in dB.

    Methods without a result are left out, and so are the 8-bit latents, which the eye can't tell from the model.
    """

    key: str
    original: Tensor
    images: dict[str, Tensor]
    psnr: dict[str, float]


@dataclass
class Measurement:
    """Everything one pass gives; `scores` is by method, in the order of `keys`."""

    keys: list[str] = field(default_factory=list)
    scores: dict[str, Scores] = field(default_factory=dict)
    latents: LatentReport = field(default_factory=LatentReport)
    latent_shape: tuple[int, ...] = ()
    examples: list[Example] = field(default_factory=list)


@torch.inference_mode()
def measure(
    model: Autoencoder,
    batches: Iterable[Batch],
    *,
    distance: Distance,
    pca: PatchPCA | None = None,
    device: torch.device | None = None,
    total: int | None = None,
    examples: Iterable[int] = (),
) -> Measurement:
    """Run model and baselines over batches; memory does not grow with their number, but for one row of numbers per image.

    Args:
        model: in evaluation mode, on `device`.
        batches: uint8 images whose sides the model's downsampling divides.
        distance: the perceptual distance.
        pca: fitted components; None leaves PCA out.
        device: where the model is.
        total: number of images, for the progress bar.
        examples: positions of the images to keep as pictures.

    Raises:
        ModelError: a latent or a reconstruction is not finite.
    """
    measurement, wanted = Measurement(), set(examples)
    with Progress("evaluating", total) as progress:
        for batch in batches:
            images, keys = batch.images.to(device), [_printable(key) for key in batch.keys]
            reconstructions = _reconstruct(model, keys, images, measurement)
            if pca is not None:
                reconstructions[PCA] = pca.reconstruct(images)
            _score(measurement, images, reconstructions, distance)
            _score_jpeg(measurement, batch, reconstructions, distance, device)
            for offset, key in enumerate(keys):
                if len(measurement.keys) + offset in wanted:
                    measurement.examples.append(_example(measurement, key, offset, len(keys), batch.images, reconstructions))
            measurement.keys.extend(keys)
            progress.advance(len(keys))
    return measurement


def _reconstruct(model: Autoencoder, keys: list[str], images: Tensor, measurement: Measurement) -> dict[str, Tensor]:
    """uint8 images from the posterior mean, and from the posterior mean in 8 bits; counts the latents and their bytes."""
    posterior = model.encode(to_float(images))
    mode = posterior.mode()
    exact = model.decode(mode)
    finite = torch.isfinite(mode).flatten(1).all(1) & torch.isfinite(exact).flatten(1).all(1)
    if not finite.all():
        key = keys[int((~finite).nonzero()[0])]
        raise ModelError(
            f"the reconstruction of {key} has NaN or infinite values; the model has diverged, evaluate an earlier checkpoint"
        )
    streams = [compress_latent(latent) for latent in mode]
    stored = torch.stack([decompress_latent(stream, mode.shape[1:]) for stream in streams]).to(mode)
    measurement.latents.add(posterior)
    measurement.latent_shape = tuple(mode.shape[1:])
    measurement.scores.setdefault(QUANTISED, Scores()).add("bytes", [float(len(stream)) for stream in streams])
    return {MODEL: to_uint8(exact), QUANTISED: to_uint8(model.decode(stored))}


def _score(measurement: Measurement, images: Tensor, reconstructions: dict[str, Tensor], distance: Distance) -> None:
    for method, reconstruction in reconstructions.items():
        scores = measurement.scores.setdefault(method, Scores())
        for metric, values in _compare(reconstruction, images, distance).items():
            scores.add(metric, values)


def _compare(made: Tensor, images: Tensor, distance: Distance) -> dict[str, Tensor]:
    """Every metric that there is for images of this size, one value an image; SSIM has a window of 11 pixels."""
    values = {"psnr": psnr(made, images)}
    if min(images.shape[-2:]) >= TAPS:
        values["ssim"] = ssim(made, images)
    if distance.module is not None:
        values["perceptual"] = distance(made, images) if len(images) else torch.empty(0)
    return values


def _score_jpeg(
    measurement: Measurement, batch: Batch, reconstructions: dict[str, Tensor], distance: Distance, device: torch.device | None
) -> None:
    """JPEG in the bytes of each image's own latent; NaN for an image whose smallest JPEG is larger."""
    budgets = measurement.scores[QUANTISED].values["bytes"][-len(batch.keys) :]
    files = [jpeg_within(image, int(budget)) for image, budget in zip(batch.images, budgets, strict=True)]
    scores = measurement.scores.setdefault(JPEG, Scores())
    scores.add("bytes", [float(len(file.data)) if file else MISSING for file in files])
    scores.add("quality", [float(file.quality) if file else MISSING for file in files])
    fits = [index for index, file in enumerate(files) if file]
    decoded = torch.stack(
        [file.image if file else torch.zeros_like(image) for file, image in zip(files, batch.images, strict=True)]
    )
    images, decoded = batch.images[fits].to(device), decoded.to(device)
    for metric, found in _compare(decoded[fits], images, distance).items():
        row = torch.full((len(files),), MISSING, dtype=torch.float64)
        row[fits] = found.cpu().double()
        scores.add(metric, row)
    reconstructions[JPEG] = decoded


def _example(
    measurement: Measurement, key: str, offset: int, batch: int, images: Tensor, reconstructions: dict[str, Tensor]
) -> Example:
    values = {method: measurement.scores[method].values["psnr"][offset - batch] for method in reconstructions}
    shown = [method for method in reconstructions if method != QUANTISED and not math.isnan(values[method])]
    return Example(key, images[offset], {m: reconstructions[m][offset].cpu() for m in shown}, {m: values[m] for m in shown})


def _printable(key: str) -> str:
    """Tar names may be no UTF-8; Python then carries the bytes as surrogates, which no text file takes."""
    return key.encode("utf-8", "backslashreplace").decode("utf-8")

"""Rate and distortion: PSNR against the bytes of images, for models and baselines.

Only bytes that decode again are counted. Models: the posterior mean in 2 to 8 bits per number,
deflated (see `methods.method`). PCA and block DCT: their leading components in 8 bits, stored
the same way. JPEG and WebP: files with headers, and only settings that no other setting beats in
both bytes and PSNR. The size of the decoder (a network, a basis, a standard) is never counted. The
rate is that of all images together, and PSNR is the mean over images. A few images are enough for
the shape of the curves, but not for their third digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from latentae.data.transforms import to_float, to_uint8
from latentae.errors import ImageError, LatentAEError, ModelError
from latentae.evaluation.methods.codecs import ImageCodec, Jpeg, WebP
from latentae.evaluation.methods.dct import BlockDCT
from latentae.evaluation.methods.method import quantize
from latentae.measures.metrics import finite_mean, psnr
from latentae.models.base import Autoencoder
from latentae.models.pca import PatchBasis, PatchPCA
from latentae.progress import Progress

__all__ = ["RATE_DISTORTION_IMAGES", "rate_distortion"]

RATE_DISTORTION_IMAGES = 24  # enough for the shape of the curves
LATENT_BITS = (2, 3, 4, 5, 6, 8)
COMPONENT_BITS = 8
QUALITIES = (5, 10, 20, 35, 50, 70, 85, 95)

Restored = Iterator[tuple[str, list[int], Tensor, Tensor]]
"""Setting, bytes of each image, restored images, original images."""


@torch.inference_mode()
def rate_distortion(
    models: Mapping[str, Autoencoder],
    images: Tensor,
    *,
    pca: PatchPCA | None = None,
    dct: BlockDCT | None = None,
    labels: Mapping[str, str] | None = None,
    batch_size: int = 8,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Measure PSNR against bytes for models, PCA, block DCT, JPEG and WebP.

    A model decodes each image six times.

    Args:
        models: by name, in evaluation mode, on `device`.
        images: uint8 [N, C, H, W], for example `RATE_DISTORTION_IMAGES` of them.
        pca: basis, measured with 1, 2, 4, ... and all components; None leaves PCA out.
        dct: the same for the DCT.
        labels: of models, for the legend; defaults to the names.
        batch_size: images per batch; affects speed and memory only.
        device: where the models are.

    Returns:
        Plain JSON values: `images`, their number; `curves`, each with `name`, `label` and `points`
        by rising `bits_per_pixel`, with `psnr` (dB, mean over the images that are not restored
        exactly; None if all are) and `setting`; and `left_out`, the methods that could not be
        measured, each with `name`, `label` and `reason`.

    Raises:
        ImageError: no images, or not uint8 [N, C, H, W].
    """
    if images.ndim != 4 or images.dtype != torch.uint8 or not images.numel():
        raise ImageError(
            f"rate and distortion need uint8 images [N, C, H, W], got {images.dtype} {tuple(images.shape)}"
        )
    batches, pixels = images.split(batch_size), images.shape[2] * images.shape[3]
    work: list[tuple[str, str, Callable[[Tensor], Restored]]] = [
        (name, (labels or {}).get(name, name), partial(_from_latents, model, device))
        for name, model in models.items()
    ]
    for name, label, basis in (("pca", "PCA", pca), ("dct", "block DCT", dct)):
        if basis:
            work.append((name, label, partial(_from_components, basis)))
    work += [(codec.name, codec.format, partial(_from_files, codec)) for codec in (Jpeg(), WebP())]
    curves, left_out = [], []
    with Progress("rate and distortion", len(work), unit="curves") as progress:
        for name, label, restore in work:
            try:
                points = _points(restore, batches, pixels)
            except LatentAEError as error:
                left_out.append({"name": name, "label": label, "reason": str(error)})
            else:
                points = _frontier(points) if name in (Jpeg.name, WebP.name) else points
                curves.append({"name": name, "label": label, "points": points})
            progress.advance()
    return {"images": len(images), "curves": curves, "left_out": left_out}


def _from_latents(model: Autoencoder, device: torch.device | None, images: Tensor) -> Restored:
    """Restore images from latents in few bits."""
    images = images.to(device)
    latents = model.encode(to_float(images)).mode()
    for bits in LATENT_BITS:
        stored, sizes = quantize(latents, bits)
        decoded = model.decode(stored)
        if not torch.isfinite(decoded).all():
            raise ModelError(f"its reconstructions from {bits}-bit latents have NaN or infinite values")
        yield f"{bits}-bit latents", sizes, to_uint8(decoded), images


def _from_components(basis: PatchBasis, images: Tensor) -> Restored:
    """Restore images from 1, 2, 4, ... and all components of a basis."""
    most = basis.components
    found = basis.encode(images)
    for kept in sorted({*(2**power for power in range(most.bit_length())), most}):
        stored, sizes = quantize(found[:, :kept], COMPONENT_BITS)
        setting = f"{kept} component{'s' if kept > 1 else ''} in {COMPONENT_BITS} bits"
        yield setting, sizes, basis.truncated(kept).decode(stored), images


def _from_files(codec: ImageCodec, images: Tensor) -> Restored:
    """Restore images from files of several qualities, in each variant of a codec."""
    channels = images.shape[1]
    if reason := codec.refuses(channels):
        raise ImageError(reason)
    for variant in codec.variants(channels):
        for quality in QUALITIES:
            files = [codec.encode(image, quality, variant) for image in images]
            restored = torch.stack([codec.decode(file, channels) for file in files])
            setting = f"quality {quality}{', ' if variant else ''}{variant}"
            yield setting, [len(file) for file in files], restored, images


def _points(
    restore: Callable[[Tensor], Restored], batches: Sequence[Tensor], pixels: int
) -> list[dict[str, Any]]:
    """One point per setting, over all batches, by rising rate."""
    sizes: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    for batch in batches:
        for setting, found, restored, originals in restore(batch):
            sizes.setdefault(setting, []).extend(found)
            values.setdefault(setting, []).extend(psnr(restored, originals).tolist())
    points = []
    for setting, found in sizes.items():
        rate = 8 * sum(found) / (len(found) * pixels)
        points.append({"bits_per_pixel": rate, "psnr": finite_mean(values[setting]), "setting": setting})
    return sorted(points, key=lambda point: point["bits_per_pixel"])


def _frontier(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points, by rising rate, that beat every cheaper one; None is exact and beats any number."""
    kept, best = [], -math.inf
    for point in points:
        value = math.inf if point["psnr"] is None else point["psnr"]
        if value > best:
            kept.append(point)
            best = value
    return kept

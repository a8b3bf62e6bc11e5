"""Rate and distortion: PSNR against the bytes that images really take, for models and for what they must beat.

Everything counts as bytes that can be decoded again. Models: the posterior mean in 2 to 8 bits a number, deflated (see
`methods.quantised`). PCA and block DCT: their leading components in 8 bits, stored the same way. JPEG and WebP: whole files with headers.
Of JPEG and WebP only settings are shown that no other one beats in both bytes and PSNR. What decodes (a network, a basis, a standard) is
counted for none of them. The rate is that of all images together, the PSNR the mean over images, so a few images are enough for the shape
of the curves and too few for their third digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentae.data.transforms import to_float, to_uint8
from latentae.errors import ImageError, LatentAEError, ModelError
from latentae.evaluation.methods.codec import ImageCodec
from latentae.evaluation.methods.dct import BlockDCT
from latentae.evaluation.methods.jpeg import Jpeg
from latentae.evaluation.methods.quantised import quantise
from latentae.evaluation.methods.webp import WebP
from latentae.measures.metrics import psnr
from latentae.models.base import Autoencoder
from latentae.models.pca import PatchBasis, PatchPCA
from latentae.progress import Progress

__all__ = ["RATE_DISTORTION_IMAGES", "rate_distortion"]

RATE_DISTORTION_IMAGES = 24
"""So many are enough for the shape of the curves."""
LATENT_BITS = (2, 3, 4, 5, 6, 8)
COMPONENT_BITS = 8
QUALITIES = (5, 10, 20, 35, 50, 70, 85, 95)

Sizes = dict[str, list[int]]
Values = dict[str, list[float]]
Measured = Iterator[
    tuple[str, list[int], Tensor, Tensor]
]  # setting, bytes of each image, restored and original images


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
    """PSNR over real bytes for models, PCA, block DCT, JPEG and WebP. A model decodes each image six times.

    Args:
        models: by name, in evaluation mode, on `device`.
        images: uint8 [N, C, H, W], a few, say `RATE_DISTORTION_IMAGES`.
        pca: components to measure 1, 2, 4, ... and all of; None leaves PCA out.
        dct: the same of the DCT.
        labels: of models, for the legend; the name where there is none.
        batch_size: images at a time; changes speed and memory only.
        device: where the models are.

    Returns:
        Plain JSON values: `images`, their number; `curves`, each with `name`, `label` and `points` by rising `bits_per_pixel`, with
        `psnr` (dB, mean over the images that are not restored exactly; None where all are) and `setting`; and `left_out`, methods that
        could not be measured, each with `name`, `label` and `reason`.

    Raises:
        ImageError: no images, or not uint8 [N, C, H, W].
    """
    if images.ndim != 4 or images.dtype != torch.uint8 or not images.numel():
        raise ImageError(
            f"rate and distortion need uint8 images [N, C, H, W], got {images.dtype} {tuple(images.shape)}"
        )
    batches, pixels = images.split(batch_size), images.shape[2] * images.shape[3]
    work: list[tuple[str, str, Callable[[Tensor], Measured], bool]] = [
        (name, (labels or {}).get(name, name), _Model(model, device), False) for name, model in models.items()
    ]
    work += [
        (name, label, _Components(basis), False)
        for name, label, basis in (("pca", "PCA", pca), ("dct", "block DCT", dct))
        if basis
    ]
    work += [(codec.name, codec.format, _Files(codec), True) for codec in (Jpeg(), WebP())]
    curves, left_out = [], []
    with Progress("rate and distortion", len(work), unit="curves") as progress:
        for name, label, measure, frontier in work:
            try:
                points = _points(measure, batches, pixels)
            except LatentAEError as error:
                left_out.append({"name": name, "label": label, "reason": str(error)})
            else:
                curves.append(
                    {"name": name, "label": label, "points": _frontier(points) if frontier else points}
                )
            progress.advance()
    return {"images": len(images), "curves": curves, "left_out": left_out}


class _Model:
    """A model with its latents in few bits."""

    def __init__(self, model: Autoencoder, device: torch.device | None) -> None:
        self.model, self.device = model, device

    def __call__(self, images: Tensor) -> Measured:
        images = images.to(self.device)
        latents = self.model.encode(to_float(images)).mode()
        for bits in LATENT_BITS:
            stored, sizes = quantise(latents, bits)
            decoded = self.model.decode(stored)
            if not torch.isfinite(decoded).all():
                raise ModelError(f"its reconstructions from {bits}-bit latents have NaN or infinite values")
            yield f"{bits}-bit latents", sizes, to_uint8(decoded), images


class _Components:
    """A basis of patches with 1, 2, 4, ... and all of its components."""

    def __init__(self, basis: PatchBasis) -> None:
        self.basis = basis

    def __call__(self, images: Tensor) -> Measured:
        most = self.basis.components
        found = self.basis.encode(images)
        for kept in sorted({*(2**power for power in range(most.bit_length())), most}):
            stored, sizes = quantise(found[:, :kept], COMPONENT_BITS)
            restored = self.basis.truncated(kept).decode(stored)
            yield (
                f"{kept} component{'s' if kept > 1 else ''} in {COMPONENT_BITS} bits",
                sizes,
                restored,
                images,
            )


class _Files:
    """A codec at a ladder of qualities, in each of its variants."""

    def __init__(self, codec: ImageCodec) -> None:
        self.codec = codec

    def __call__(self, images: Tensor) -> Measured:
        channels = images.shape[1]
        if reason := self.codec.refuses(channels):
            raise ImageError(reason)
        for variant in self.codec.variants(channels):
            for quality in QUALITIES:
                files = [self.codec.encode(image, quality, variant) for image in images]
                restored = torch.stack([self.codec.decode(file, channels) for file in files])
                yield (
                    f"quality {quality}{', ' if variant else ''}{variant}",
                    [len(file) for file in files],
                    restored,
                    images,
                )


def _points(
    measure: Callable[[Tensor], Measured], batches: Sequence[Tensor], pixels: int
) -> list[dict[str, Any]]:
    """One point for each setting, over all batches, by rising rate."""
    sizes: Sizes = {}
    values: Values = {}
    for batch in batches:
        for setting, found, restored, originals in measure(batch):
            sizes.setdefault(setting, []).extend(found)
            values.setdefault(setting, []).extend(psnr(restored, originals).tolist())
    points = [
        {
            "bits_per_pixel": 8 * sum(found) / (len(found) * pixels),
            "psnr": _mean(values[setting]),
            "setting": setting,
        }
        for setting, found in sizes.items()
    ]
    return sorted(points, key=lambda point: point["bits_per_pixel"])


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def _frontier(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of points by rising rate those that are better than every cheaper one; None is exact, better than any number."""
    kept, best = [], -math.inf
    for point in points:
        value = math.inf if point["psnr"] is None else point["psnr"]
        if value > best:
            kept.append(point)
            best = value
    return kept

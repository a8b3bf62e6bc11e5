"""The latents that diffusability looks at: a bounded number, chosen by the hash of their keys, and whitened per channel."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentae.data.loader import Batch
from latentae.data.transforms import to_float
from latentae.errors import DataError, ModelError
from latentae.evaluation.diffusability.keyed import digest
from latentae.measures.extractors import Extractor
from latentae.models.base import Autoencoder
from latentae.models.latent_statistics import LatentStatistics
from latentae.progress import Progress

__all__ = ["LATENTS", "NUMBERS", "Latents", "Whitening", "collect"]

LATENTS = 4096
"""Most latents kept."""
NUMBERS = 2**25
"""Most numbers in the kept means, 134 MB; as many again in their standard deviations."""


@dataclass(frozen=True)
class Whitening:
    """(z - mean) / std of each channel of sampled latents, so that any two latent spaces look alike to first order.

    Attributes:
        mean: fp32 [z, 1, 1].
        std: fp32 [z, 1, 1]; 1 for a channel that never varies.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, statistics: LatentStatistics) -> Whitening:
        """By the statistics of sampled latents; DataError where they have seen none."""
        if not statistics.count:
            raise DataError(
                "the latent statistics have seen no latent; give those of the images that are looked at"
            )
        summary = statistics.summary()
        std = np.array(summary["latents_std"])
        std = np.where(std > 0, std, 1.0)
        mean, std = (
            torch.tensor(values, dtype=torch.float32)[:, None, None]
            for values in (summary["latents_mean"], std)
        )
        return cls(mean, std)

    def whiten(self, z: Tensor) -> Tensor:
        """Raw latents [..., z, h, w] -> whitened, the same shape."""
        return (z - self.mean.to(z.device)) / self.std.to(z.device)

    def restore(self, whitened: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        return whitened * self.std.to(whitened.device) + self.mean.to(whitened.device)


@dataclass(frozen=True)
class Latents:
    """Posteriors of images in the order of their keys' hashes, on the CPU.

    Attributes:
        keys: of the images.
        means: fp32 [z, h, w] each.
        stds: of the posteriors, fp32 [z, h, w] each.
        features: of the originals, fp32 [n, d]; None where no extractor was given.
        seen: images that they were chosen from.
    """

    keys: tuple[str, ...]
    means: tuple[Tensor, ...]
    stds: tuple[Tensor, ...]
    features: Tensor | None
    seen: int

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, order=True)
class _Kept:
    """Smallest first in a heap: the largest hash, which goes first."""

    order: tuple[int, str, int]
    row: tuple[Tensor, ...]


@torch.inference_mode()
def collect(
    model: Autoencoder,
    batches: Iterable[Batch],
    extractor: Extractor | None = None,
    *,
    device: torch.device | None = None,
    limit: int = LATENTS,
    purpose: str = "images",
    progress: bool = True,
) -> Latents:
    """Encode the images whose keys have the smallest hashes: a sample that depends on nothing but the set of images.

    Args:
        model: in evaluation mode, on `device`.
        batches: keys, and uint8 images of one size [B, C, H, W].
        extractor: whose features are kept, too.
        device: where model and extractor are.
        limit: latents at most; fewer are kept where they would hold more than `NUMBERS` numbers.
        purpose: what the images are, for the progress bar.
        progress: whether to say how far it is.

    Raises:
        DataError: images of different sizes.
        ModelError: a latent is not finite.
    """
    heap: list[_Kept] = []
    seen, size = 0, None
    with Progress(f"encoding {purpose}", None, quiet=not progress) as bar:
        for batch in batches:
            size = size or tuple(batch.images.shape[1:])
            if tuple(batch.images.shape[1:]) != size:
                raise DataError(
                    f"found images of {tuple(batch.images.shape[1:])} after {size}; give images of one size"
                )
            kept = _capacity(model, size, limit)
            orders = [(-digest("kept", key), key, seen + row) for row, key in enumerate(batch.keys)]
            rows = [row for row, order in enumerate(orders) if len(heap) < kept or order > heap[0].order]
            if rows:
                found = _encode(model, batch, rows, extractor, device)
                for row, *values in zip(rows, *found, strict=True):
                    heapq.heappush(heap, _Kept(orders[row], tuple(values)))
                    if len(heap) > kept:
                        heapq.heappop(heap)
            seen += len(batch.keys)
            bar.advance(len(batch.keys))
    heap.sort(key=lambda kept: (-kept.order[0], kept.order[1]))
    columns = list(zip(*(kept.row for kept in heap), strict=True)) or [(), ()]
    features = torch.stack(columns[2]) if len(columns) > 2 else None
    return Latents(tuple(kept.order[1] for kept in heap), columns[0], columns[1], features, seen)


def _capacity(model: Autoencoder, size: tuple[int, ...], limit: int) -> int:
    numbers = model.config.latent_channels * math.prod(size[1:]) // model.config.downsampling**2
    return max(min(limit, LATENTS, NUMBERS // max(numbers, 1)), 2)


def _encode(
    model: Autoencoder,
    batch: Batch,
    rows: list[int],
    extractor: Extractor | None,
    device: torch.device | None,
) -> list[tuple[Tensor, ...]]:
    """Columns of means, standard deviations and, with an extractor, features of some rows of a batch, each row's in memory of its own."""
    images = batch.images[rows].to(device)
    posterior = model.encode(to_float(images))
    finite = torch.isfinite(posterior.mean).flatten(1).all(1) & torch.isfinite(posterior.std).flatten(1).all(
        1
    )
    if not finite.all():
        key = batch.keys[rows[int((~finite).nonzero()[0])]]
        raise ModelError(
            f"the latent of {key} has NaN or infinite values; the model has diverged, evaluate an earlier checkpoint"
        )
    columns = [posterior.mean.float(), posterior.std.float()]
    if extractor is not None:
        columns.append(extractor(images))
    return [tuple(row.cpu().clone() for row in column) for column in columns]

"""Latents of diffusability: a bounded number, whitened per channel, and midpoints of neighbors.

A diffusion model will sample at midpoints. This is "iFID" of Xu et al. 2026, "Making reconstruction
FID predictive of diffusion generation FID", arXiv 2603.05630, read from the authors' code. Of the
10 reference latents nearest by cosine, one is drawn with probability softmax(-mean squared
difference). The two latents are interpolated spherically at 1/2 and decoded. Ours are whitened per
channel first, so that no channel's scale or offset decides which latents are near.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentae.data.loader import Batch
from latentae.data.transforms import to_float
from latentae.errors import DataError
from latentae.keyed import digest
from latentae.measures.frechet import Extractor
from latentae.measures.metrics import check_finite
from latentae.models.base import Autoencoder
from latentae.models.latent_statistics import LatentStatistics
from latentae.progress import Progress

__all__ = [
    "LATENTS",
    "NEIGHBORS",
    "NUMBERS",
    "Latents",
    "Whitening",
    "collect",
    "draw_neighbors",
    "midpoint",
    "nearest",
]

LATENTS = 4096  # maximum number of latents
NUMBERS = 2**25  # maximum numbers in all means, 134 MB; their standard deviations take the same again
NEIGHBORS = 10
AT_A_TIME = 256  # latents per block, to bound memory
DIGITS = 6  # of a cosine; the seventh is noise in fp32


@dataclass(frozen=True)
class Whitening:
    """(z - mean) / std of each channel of sampled latents, so that latent spaces are comparable.

    Attributes:
        mean: fp32 [z, 1, 1].
        std: fp32 [z, 1, 1]; 1 for a channel that never varies.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, statistics: LatentStatistics) -> Whitening:
        """Whitening by the statistics of sampled latents.

        Raises:
            DataError: the statistics are empty.
        """
        if not statistics.count:
            raise DataError("the latent statistics have seen no latent; give those of the measured images")
        summary = statistics.summary()
        mean, std = (torch.tensor(summary[name])[:, None, None] for name in ("latents_mean", "latents_std"))
        return cls(mean, torch.where(std > 0, std, 1.0))

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
        features: of the originals, fp32 [n, d]; None without an extractor.
        seen: number of images that they were chosen from.
    """

    keys: tuple[str, ...]
    means: tuple[Tensor, ...]
    stds: tuple[Tensor, ...]
    features: Tensor | None
    seen: int

    def __len__(self) -> int:
        return len(self.keys)


@torch.inference_mode()
def collect(
    model: Autoencoder,
    batches: Iterable[Batch],
    extractor: Extractor | None = None,
    *,
    device: torch.device | None = None,
    limit: int = LATENTS,
    purpose: str = "images",
) -> Latents:
    """Encode the images whose keys have the smallest hashes.

    This sample depends only on the set of images.

    Args:
        model: in evaluation mode, on `device`.
        batches: keys, and uint8 images of one size [B, C, H, W].
        extractor: of features to keep as well.
        device: where model and extractor are.
        limit: maximum number of latents; fewer if they would exceed `NUMBERS` numbers.
        purpose: name of the images in the progress bar.

    Raises:
        DataError: images of different sizes.
        ModelError: a latent is not finite.
    """
    # Entries are (order, row), smallest order first: the largest hash is dropped first. Orders are
    # unique.
    heap: list[tuple[tuple[int, str, int], tuple[Tensor, ...]]] = []
    seen, size = 0, None
    with Progress(f"encoding {purpose}", None) as bar:
        for batch in batches:
            shape = tuple(batch.images.shape[1:])
            size = size or shape
            if shape != size:
                raise DataError(f"found images of {shape} after {size}; give images of one size")
            most = _capacity(model, size, limit)
            orders = [(-digest("kept", key), key, seen + row) for row, key in enumerate(batch.keys)]
            rows = [row for row, order in enumerate(orders) if len(heap) < most or order > heap[0][0]]
            if rows:
                columns = _encode(model, batch, rows, extractor, device)
                for row, *values in zip(rows, *columns, strict=True):
                    heapq.heappush(heap, (orders[row], tuple(values)))
                    if len(heap) > most:
                        heapq.heappop(heap)
            seen += len(batch.keys)
            bar.advance(len(batch.keys))
    heap.sort(key=lambda entry: (-entry[0][0], entry[0][1]))
    columns = list(zip(*(row for _, row in heap), strict=True)) or [(), ()]
    features = torch.stack(columns[2]) if len(columns) > 2 else None
    return Latents(tuple(key for (_, key, _), _ in heap), columns[0], columns[1], features, seen)


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
    """Means, standard deviations and features of some rows of a batch, each in its own memory."""
    images = batch.images[rows].to(device)
    posterior = model.encode(to_float(images))
    check_finite("latent", [batch.keys[row] for row in rows], posterior.mean, posterior.std)
    columns = [posterior.mean.float(), posterior.std.float()]
    if extractor is not None:
        columns.append(extractor(images))
    return [tuple(row.cpu().clone() for row in column) for column in columns]


def draw_neighbors(
    images: Latents,
    references: Latents,
    whitening: Whitening,
    *,
    itself: bool,
    count: int = NEIGHBORS,
    seed: int = 0,
) -> list[int]:
    """Draw one of the `count` nearest references of each latent.

    Args:
        images: the latents.
        references: latents to find neighbors in.
        whitening: of both.
        itself: whether a reference may have the same position; False if both are the same latents.
        count: number of nearest references to draw from; all if there are fewer.
        seed: of the draw, which also depends on the image's key.

    Returns:
        A position in `references` for each latent.
    """
    chosen = []
    found = nearest(images.means, references.means, whitening, itself=itself, count=count)
    for row, candidates in enumerate(found):
        candidates.sort()  # so that the last bits of cosines do not change the draw
        own = whitening.whiten(images.means[row])
        near = whitening.whiten(torch.stack([references.means[position] for position in candidates]))
        weights = torch.softmax(-(near - own).double().square().mean(dim=(1, 2, 3)), dim=0)
        uniform = (digest(seed, "neighbour", images.keys[row]) >> 11) / 2**53
        below = int((weights.cumsum(0) <= uniform).sum())
        chosen.append(candidates[min(below, len(candidates) - 1)])
    return chosen


def nearest(
    latents: Sequence[Tensor], references: Sequence[Tensor], whitening: Whitening, *, itself: bool, count: int
) -> list[list[int]]:
    """Positions of the `count` references with the largest cosine to each latent, nearest first.

    Latents are whitened and flattened. Cosines are rounded to six digits; ties go to the earlier
    position.
    """
    count = min(count, len(references) - (not itself))
    found = []
    for start in range(0, len(latents), AT_A_TIME):
        queries = _directions(latents[start : start + AT_A_TIME], whitening)
        best = torch.empty(len(queries), 0)
        positions = torch.empty(len(queries), 0, dtype=torch.long)
        for first in range(0, len(references), AT_A_TIME):
            keys = _directions(references[first : first + AT_A_TIME], whitening)
            block = (queries @ keys.T).round(decimals=DIGITS)
            columns = torch.arange(first, first + block.shape[1])
            if not itself:
                block[torch.arange(start, start + len(queries))[:, None] == columns] = -torch.inf
            best, order = torch.cat([best, block], dim=1).sort(dim=1, descending=True, stable=True)
            positions = torch.cat([positions, columns.expand(len(queries), -1)], dim=1).gather(1, order)
            best, positions = best[:, :count], positions[:, :count]
        found.extend(positions.tolist())
    return found


def midpoint(a: Tensor, b: Tensor) -> Tensor:
    """Interpolate latents [B, z, h, w] spherically about 0 at 1/2.

    Shoemake 1985: (a + b) / (2 cos(w / 2)), w the angle between them.

    Linear if they are opposite, where the arc is not unique.
    """
    x, y = a.double().flatten(1), b.double().flatten(1)
    cosine = ((x * y).sum(dim=1) / (x.norm(dim=1) * y.norm(dim=1)).clamp_min(1e-300)).clamp(-1, 1)
    half = ((1 + cosine) / 2).sqrt()  # cos(w / 2)
    half = torch.where(half < 1e-6, torch.ones_like(half), half)
    return ((x + y) / (2 * half[:, None])).view_as(a).to(a.dtype)


def _directions(latents: Sequence[Tensor], whitening: Whitening) -> Tensor:
    return torch.nn.functional.normalize(whitening.whiten(torch.stack(list(latents))).flatten(1), dim=1)

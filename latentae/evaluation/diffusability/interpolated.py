"""Latents at the midpoint between neighbors, where a diffusion model will sample.

"iFID" of Xu et al. 2026, "Making reconstruction FID predictive of diffusion generation FID", arXiv
2603.05630, read from the authors' code. Of the 10 reference latents nearest by cosine, one is drawn
with probability softmax(-mean squared difference). The two latents are interpolated spherically at
1/2 and decoded. Ours are whitened per channel first, so that no channel's scale or offset decides
which latents are near.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentae.evaluation.diffusability.latents import Latents, Whitening
from latentae.keyed import digest

__all__ = ["NEIGHBORS", "draw_neighbors", "midpoint", "nearest"]

NEIGHBORS = 10
AT_A_TIME = 256  # latents per block, to bound memory
DIGITS = 6  # of a cosine; the seventh is noise in fp32


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

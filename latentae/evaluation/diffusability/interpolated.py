"""Frechet distance half way between neighbours: what lies between latents must look like images, for a diffusion model will go there.

"iFID" of Xu et al. 2026, "Making reconstruction FID predictive of diffusion generation FID", arXiv 2603.05630, read from the authors' code:
of the 10 reference latents nearest by cosine one is drawn with probability softmax(-mean squared difference), the two are interpolated
spherically at 1/2 and decoded. Ours are whitened per channel first, so that no channel's scale or offset decides what is near.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentae.evaluation.diffusability.keyed import uniform
from latentae.evaluation.diffusability.latents import Latents, Whitening

__all__ = ["NEIGHBOURS", "draw_neighbours", "halfway", "nearest"]

NEIGHBOURS = 10
AT_A_TIME = 256  # latents: flat memory
_DIGITS = 6  # of a cosine; fp32 leaves the seventh to chance


def draw_neighbours(
    images: Latents,
    references: Latents,
    whitening: Whitening,
    *,
    itself: bool,
    count: int = NEIGHBOURS,
    seed: int = 0,
) -> list[int]:
    """For each latent the position of one of its `count` nearest references.

    Args:
        images: the latents that are looked at.
        references: where their neighbours are.
        whitening: of both.
        itself: whether a reference may be the latent of the same position; False where both are the same latents.
        count: how many nearest to draw from; all where there are fewer.
        seed: of the draw, which depends on the key of each image besides.
    """
    chosen = []
    for row, candidates in enumerate(
        nearest(images.means, references.means, whitening, itself=itself, count=count)
    ):
        candidates.sort()  # a draw that followed the order of cosines would change with their last bits
        own = whitening.whiten(images.means[row])
        near = whitening.whiten(torch.stack([references.means[position] for position in candidates]))
        weights = torch.softmax(-(near - own).double().square().mean(dim=(1, 2, 3)), dim=0)
        below = int((weights.cumsum(0) <= uniform(seed, "neighbour", images.keys[row])).sum())
        chosen.append(candidates[min(below, len(candidates) - 1)])
    return chosen


def nearest(
    latents: Sequence[Tensor], references: Sequence[Tensor], whitening: Whitening, *, itself: bool, count: int
) -> list[list[int]]:
    """Positions of the `count` references with the largest cosine to each latent, all whitened and flattened; nearest first.

    Cosines count with six digits; of equal ones the earlier position comes first.
    """
    count = min(count, len(references) - (not itself))
    found = []
    for start in range(0, len(latents), AT_A_TIME):
        queries = _directions(latents[start : start + AT_A_TIME], whitening)
        best = torch.empty(len(queries), 0)
        positions = torch.empty(len(queries), 0, dtype=torch.long)
        for first in range(0, len(references), AT_A_TIME):
            block = (queries @ _directions(references[first : first + AT_A_TIME], whitening).T).round(
                decimals=_DIGITS
            )
            columns = torch.arange(first, first + block.shape[1])
            if not itself:
                block[torch.arange(start, start + len(queries))[:, None] == columns] = -torch.inf
            best, order = torch.cat([best, block], dim=1).sort(dim=1, descending=True, stable=True)
            positions = torch.cat([positions, columns.expand(len(queries), -1)], dim=1).gather(1, order)
            best, positions = best[:, :count], positions[:, :count]
        found.extend(positions.tolist())
    return found


def halfway(a: Tensor, b: Tensor) -> Tensor:
    """Spherical interpolation at 1/2 of latents [B, z, h, w] about 0 (Shoemake 1985): (a + b) / (2 cos(w / 2)), w the angle between them.

    Linear where they are opposite, which leaves the arc open.
    """
    x, y = a.double().flatten(1), b.double().flatten(1)
    cosine = ((x * y).sum(dim=1) / (x.norm(dim=1) * y.norm(dim=1)).clamp_min(1e-300)).clamp(-1, 1)
    half = ((1 + cosine) / 2).sqrt()  # cos(w / 2)
    half = torch.where(half < 1e-6, torch.ones_like(half), half)
    return ((x + y) / (2 * half[:, None])).view_as(a).to(a.dtype)


def _directions(latents: Sequence[Tensor], whitening: Whitening) -> Tensor:
    return torch.nn.functional.normalize(whitening.whiten(torch.stack(list(latents))).flatten(1), dim=1)

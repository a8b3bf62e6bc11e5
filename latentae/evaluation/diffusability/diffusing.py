"""Diffusability: the Frechet distance of what lies between latents, and of what a tiny flow draws (docs/diffusability.md)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentae.data.loader import Batch
from latentae.data.transforms import resize_and_center_crop, to_uint8
from latentae.errors import RecipeError
from latentae.evaluation.diffusability.flow import EVALUATIONS, Fitted, draw, fit_flow
from latentae.evaluation.diffusability.interpolated import NEIGHBOURS, draw_neighbours, halfway
from latentae.evaluation.diffusability.latents import LATENTS, Latents, Whitening, collect
from latentae.measures.extractors import Extractor, as_rgb
from latentae.measures.frechet import Moments, SplitMoments, frechet_distance
from latentae.models.base import Autoencoder
from latentae.models.latent_statistics import LatentStatistics
from latentae.pages.images import image_grid
from latentae.progress import Progress

__all__ = ["BATCH", "LIMITS", "SAMPLES", "STEPS", "DiffusabilityResult", "diffusability"]

STEPS, BATCH, SAMPLES = 300, 32, 256
LIMITS = (
    "A ranking aid, no gFID: it orders models that were measured on the same images, with the same extractor, steps and seeds, and its "
    "numbers mean nothing elsewhere. A flow this small and short shows how quickly a space is learned, not what a large model would reach; "
    "it is compared with the images it was fitted to. Differences within the spread of the seeds are none."
)
_AT_A_TIME = 32  # latents decoded
_SHOWN, _SHOWN_SIDE, _COLUMNS = 16, 256, 8


@dataclass(frozen=True)
class DiffusabilityResult:
    """What was measured.

    Attributes:
        result: plain JSON values; only "missing", with the reason, where nothing could be measured.
        pictures: uint8 [3, H, W] by name: "samples" of the first seed's flow; "interpolated", where each column shows the reconstruction
            of an image, the decoded latent half way, and the reconstruction of the neighbour.
    """

    result: dict[str, Any]
    pictures: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def diffusability(
    model: Autoencoder,
    batches: Iterable[Batch],
    extractor: Extractor,
    *,
    statistics: LatentStatistics,
    neighbours: Iterable[Batch] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = STEPS,
    batch: int = BATCH,
    samples: int = SAMPLES,
    limit: int = LATENTS,
    seed: int = 0,
    device: torch.device | None = None,
    progress: bool = True,
) -> DiffusabilityResult:
    """Measure how easily a diffusion model could learn the latents of some images; memory does not grow with their number.

    Args:
        model: in evaluation mode, on `device`.
        batches: uint8 images of one size [B, C, H, W] with C of 1, 3 or 4, and their keys. At most `limit` (and 134 MB of latents) are
            looked at, chosen by the hash of the key.
        extractor: of the Frechet distances.
        statistics: of the latents of these images; they whiten.
        neighbours: images that neighbours are looked for in, such as training images; the same images when not given.
        seeds: of the flows.
        steps: of each flow; 0 draws white noise.
        batch: latents in a step.
        samples: drawn of each flow, no more than there are images.
        limit: images at most.
        seed: of the draw among neighbours, and of all flows together.
        device: where model and extractor are, and where flows are trained.
        progress: whether to say how far it is, and how long it will take.

    Raises:
        RecipeError: a number that makes no sense.
        DataError: images of different sizes, or statistics of no latent.
        ModelError: a latent is not finite.
    """
    if steps < 0 or batch < 1 or samples < 2 or limit < 2 or not seeds:
        raise RecipeError(
            f"steps is {steps}, batch {batch}, samples {samples}, limit {limit} and seeds {list(seeds)}; expected at least 0, 1, 2, 2 and "
            "one seed"
        )
    whitening = Whitening.of(statistics)
    images = collect(model, batches, extractor, device=device, limit=limit, progress=progress)
    if len(images) < 2:
        return DiffusabilityResult(
            {"missing": f"found {len(images)} images, a Frechet distance needs 2 or more"}
        )
    assert images.features is not None
    originals = SplitMoments.of(images.keys, images.features)
    job = _Job(model, extractor, whitening, originals.whole, device)
    interpolated, strip = _interpolated(job, images, neighbours, limit, seed, progress)
    flow, grid = _flows(job, images, list(seeds), steps, batch, min(samples, len(images)), seed, progress)
    result = {
        "extractor": extractor.name,
        "convention": extractor.convention,
        "images": len(images),
        "seen": images.seen,
        "floor": originals.floor(),
        "interpolated": interpolated,
        "flow": flow,
        "limits": LIMITS,
    }
    pictures = {"samples": grid, "interpolated": strip}
    return DiffusabilityResult(
        result, {name: picture for name, picture in pictures.items() if picture is not None}
    )


@dataclass(frozen=True)
class _Job:
    """What every part of the measurement needs."""

    model: Autoencoder
    extractor: Extractor
    whitening: Whitening
    originals: Moments
    device: torch.device | None

    def decode(self, whitened: Tensor) -> Tensor | None:
        """Whitened latents -> uint8 images on `device`, or None where they are not finite."""
        images = self.model.decode(self.whitening.restore(whitened.to(self.device)))
        return to_uint8(images) if bool(torch.isfinite(images).all()) else None

    def frechet(self, parts: Iterable[Tensor | None]) -> float | None:
        """Distance of images, in parts, to the originals; None where a part is missing."""
        moments = Moments.empty(self.extractor.dim)
        for part in parts:
            if part is None:
                return None
            moments = moments.merge(Moments.of(self.extractor(part)))
        return frechet_distance(self.originals, moments)


def _interpolated(
    job: _Job, images: Latents, neighbours: Iterable[Batch] | None, limit: int, seed: int, progress: bool
) -> tuple[dict[str, Any], Tensor | None]:
    references, source = images, "the same images"
    if neighbours is not None:
        references = collect(
            job.model, neighbours, device=job.device, limit=limit, purpose="neighbours", progress=progress
        )
        source = "training images"
        if not len(references):
            return {"missing": "there are no training images to find neighbours in"}, None
    itself = neighbours is not None
    chosen = draw_neighbours(images, references, job.whitening, itself=itself, seed=seed)

    def ends(start: int, stop: int) -> tuple[Tensor, Tensor]:
        near = torch.stack([references.means[position] for position in chosen[start:stop]])
        return job.whitening.whiten(torch.stack(images.means[start:stop])), job.whitening.whiten(near)

    def between(bar: Progress) -> Iterator[Tensor | None]:
        for start in range(0, len(images), _AT_A_TIME):
            stop = min(start + _AT_A_TIME, len(images))
            yield job.decode(halfway(*ends(start, stop)))
            bar.advance(stop - start)

    with Progress("decoding between neighbours", len(images), quiet=not progress) as bar:
        value = job.frechet(between(bar))
    count = min(NEIGHBOURS, len(references) - (not itself))
    result: dict[str, Any] = {
        "frechet": value,
        "neighbours": count,
        "from": source,
        "references": len(references),
    }
    if value is None:
        return {**result, "missing": "a latent half way decoded to no finite image"}, None
    first, last = ends(0, _COLUMNS)
    rows = [job.decode(whitened) for whitened in (first, halfway(first, last), last)]
    complete = all(row is not None for row in rows)
    return result, image_grid(
        [_shown(row) for row in rows if row is not None], columns=_COLUMNS
    ) if complete else None


def _flows(
    job: _Job,
    images: Latents,
    seeds: list[int],
    steps: int,
    batch: int,
    samples: int,
    seed: int,
    progress: bool,
) -> tuple[dict[str, Any], Tensor | None]:
    """All flows, one after the other; progress counts passes of one latent through the network, a step being three of each."""
    work = len(seeds) * (3 * steps * batch + EVALUATIONS * samples)
    values: list[float | None] = []
    fits: list[Fitted] = []
    shown: list[Tensor] = []
    with Progress("fitting tiny flows", work, unit="passes", quiet=not progress) as bar:
        for number, own in enumerate(seeds):
            name = f"flow {number + 1} of {len(seeds)}"

            def learned(loss: float, name: str = name) -> None:
                bar.advance(3 * batch, f"{name}, loss {loss:.3f}")

            fitted = fit_flow(
                images,
                job.whitening,
                steps=steps,
                batch=batch,
                seed=_own(seed, own),
                device=job.device,
                advance=learned,
            )
            fits.append(fitted)
            parts = _samples(job, fitted, samples, _own(seed, own), [] if number else shown, bar)
            values.append(job.frechet(parts))
    found = [value for value in values if value is not None]
    result: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in fits[0].network.parameters()),
        "patch": fits[0].network.patch,
        "tokens": math.prod(fits[0].network.grid),
        "steps": steps,
        "batch": batch,
        "samples": samples,
        "seeds": seeds,
        "frechet": {
            "mean": float(np.mean(found)) if found else None,
            "std": float(np.std(found, ddof=1)) if len(found) > 1 else None,
            "values": values,
        },
        "loss": {"values": [fitted.loss for fitted in fits]},
    }
    if len(found) < len(values):
        result["missing"] = (
            f"{len(values) - len(found)} of {len(values)} flows diverged, or what they drew decoded to no finite image"
        )
    return result, image_grid([shown], columns=_COLUMNS) if shown else None


def _samples(
    job: _Job, fitted: Fitted, count: int, seed: int, shown: list[Tensor], bar: Progress
) -> Iterator[Tensor | None]:
    """Decoded samples in parts, the first of them also into `shown`; None where the flow diverged."""
    if fitted.diverged:
        yield None
        return
    for start in range(0, count, _AT_A_TIME):
        part = min(_AT_A_TIME, count - start)
        images = job.decode(draw(fitted.network, part, seed=seed, start=start))
        if images is not None and start < _SHOWN:
            shown.extend(_shown(images[: _SHOWN - start]))
        yield images
        bar.advance(EVALUATIONS * part, "drawing")


def _own(seed: int, flow: int) -> int:
    """One seed of two; that of flow n is n with the default seed of 0."""
    return seed * 1_000_003 + flow


def _shown(images: Tensor) -> list[Tensor]:
    """uint8 [B, C, H, W] -> RGB pictures [3, h, w] of 256 pixels at most."""
    pictures = as_rgb(images).cpu()
    if min(pictures.shape[-2:]) <= _SHOWN_SIDE:
        return list(pictures.clone())
    return [resize_and_center_crop(picture, _SHOWN_SIDE) for picture in pictures]

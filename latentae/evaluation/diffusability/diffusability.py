"""Diffusability: Frechet distances of decoded midpoints and of samples of a flow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentae.data.loader import Batch
from latentae.data.transforms import resize_and_center_crop, to_uint8
from latentae.errors import RecipeError
from latentae.evaluation.diffusability.flow import EVALUATIONS, Fitted, draw, fit_flow
from latentae.evaluation.diffusability.latents import (
    LATENTS,
    NEIGHBORS,
    Latents,
    Whitening,
    collect,
    draw_neighbors,
    midpoint,
)
from latentae.measures.frechet import Extractor, as_rgb, frechet_distance, noise_floor, split_moments
from latentae.models.base import Autoencoder
from latentae.models.latent_statistics import LatentStatistics, Moments
from latentae.pages.images import image_grid
from latentae.progress import Progress

__all__ = ["BATCH", "LIMITS", "SAMPLES", "STEPS", "diffusability"]

STEPS, BATCH, SAMPLES = 300, 32, 256
LIMITS = (
    "A ranking aid, no gFID: it orders models that were measured on the same images, with the same "
    "extractor, steps and seeds, and its "
    "numbers mean nothing elsewhere. A flow this small and short shows how quickly a space is learned, not "
    "what a large model would reach; "
    "it is compared with the images it was fitted to. Differences within the spread of the seeds are none."
)
AT_A_TIME = 32  # latents decoded
SHOWN, SHOWN_SIDE, COLUMNS = 16, 256, 8


@torch.no_grad()
def diffusability(
    model: Autoencoder,
    batches: Iterable[Batch],
    extractor: Extractor,
    *,
    statistics: LatentStatistics,
    neighbors: Iterable[Batch] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = STEPS,
    batch: int = BATCH,
    samples: int = SAMPLES,
    limit: int = LATENTS,
    seed: int = 0,
    device: torch.device | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measure how easily a diffusion model can learn the latents of some images.

    Memory does not grow with their number.

    Args:
        model: in evaluation mode, on `device`.
        batches: uint8 images of one size [B, C, H, W] with C of 1, 3 or 4, and their keys. At most
            `limit` images (and 134 MB of latents) are used, chosen by the hash of the key.
        extractor: of features for the Frechet distances.
        statistics: of the latents of these images, for whitening.
        neighbors: images to find neighbors in, such as training images; defaults to the same
            images.
        seeds: of the flows.
        steps: of each flow; 0 samples white noise.
        batch: latents per step.
        samples: per flow, at most the number of images.
        limit: maximum number of images.
        seed: of the draw among neighbors, and of all flows.
        device: where model and extractor are, and where flows are trained.

    Returns:
        Plain JSON values; only "missing", with the reason, if nothing could be measured. And
        pictures uint8 [3, H, W] by name: "samples" of the first seed's flow; "interpolated", where
        each column shows the reconstruction of an image, the decoded midpoint, and the
        reconstruction of the neighbor.

    Raises:
        RecipeError: a number is too small.
        DataError: images of different sizes, or empty statistics.
        ModelError: a latent is not finite.
    """
    _check(steps, batch, samples, limit, seeds)
    whitening = Whitening.of(statistics)
    images = collect(model, batches, extractor, device=device, limit=limit)
    if len(images) < 2:
        return {"missing": f"found {len(images)} images, a Frechet distance needs 2 or more"}, {}
    assert images.features is not None
    halves = split_moments(images.keys, images.features)
    job = _Job(model, extractor, whitening, images, halves[0].merge(halves[1]), device, seed)
    references = None
    if neighbors is not None:
        references = collect(model, neighbors, device=device, limit=limit, purpose="neighbours")
    interpolated, strip = job.interpolate(references)
    flow, grid = job.fit_flows(list(seeds), steps, batch, min(samples, len(images)))
    result = {
        "extractor": extractor.name,
        "convention": extractor.convention,
        "images": len(images),
        "seen": images.seen,
        "floor": noise_floor(halves),
        "interpolated": interpolated,
        "flow": flow,
        "limits": LIMITS,
    }
    pictures = {"samples": grid, "interpolated": strip}
    return result, {name: picture for name, picture in pictures.items() if picture is not None}


def _check(steps: int, batch: int, samples: int, limit: int, seeds: Sequence[int]) -> None:
    if steps < 0 or batch < 1 or samples < 2 or limit < 2 or not seeds:
        raise RecipeError(
            f"steps is {steps}, batch {batch}, samples {samples}, limit {limit} and seeds {list(seeds)}; "
            "expected at least 0, 1, 2, 2 and one seed"
        )


@dataclass(frozen=True)
class _Job:
    """What both measurements need."""

    model: Autoencoder
    extractor: Extractor
    whitening: Whitening
    images: Latents
    originals: Moments
    device: torch.device | None
    seed: int

    def interpolate(self, references: Latents | None) -> tuple[dict[str, Any], Tensor | None]:
        """Distance of decoded midpoints, and a picture; references default to the images."""
        images, itself = self.images, references is not None
        source = "training images" if itself else "the same images"
        references = references if references is not None else images
        if not len(references):
            return {"missing": "there are no training images to find neighbours in"}, None
        chosen = draw_neighbors(images, references, self.whitening, itself=itself, seed=self.seed)

        def ends(start: int, stop: int) -> tuple[Tensor, Tensor]:
            near = torch.stack([references.means[position] for position in chosen[start:stop]])
            return self.whitening.whiten(torch.stack(images.means[start:stop])), self.whitening.whiten(near)

        def midpoints(bar: Progress) -> Iterator[Tensor | None]:
            for start in range(0, len(images), AT_A_TIME):
                stop = min(start + AT_A_TIME, len(images))
                yield self.decode(midpoint(*ends(start, stop)))
                bar.advance(stop - start)

        with Progress("decoding between neighbours", len(images)) as bar:
            value = self.frechet(midpoints(bar))
        result: dict[str, Any] = {
            "frechet": value,
            "neighbours": min(NEIGHBORS, len(references) - (not itself)),
            "from": source,
            "references": len(references),
        }
        if value is None:
            return {**result, "missing": "a latent half way decoded to no finite image"}, None
        first, last = ends(0, COLUMNS)
        rows = [self.decode(whitened) for whitened in (first, midpoint(first, last), last)]
        shown = [_shown(row) for row in rows if row is not None]
        return result, image_grid(shown, columns=COLUMNS) if len(shown) == len(rows) else None

    def fit_flows(
        self, seeds: list[int], steps: int, batch: int, samples: int
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Distance of samples of a flow per seed, and a picture of the first flow's."""
        work = len(seeds) * (
            3 * steps * batch + EVALUATIONS * samples
        )  # passes; a training step is 3 per latent
        values: list[float | None] = []
        fits: list[Fitted] = []
        shown: list[Tensor] = []
        with Progress("fitting tiny flows", work, unit="passes") as bar:
            for number, flow_seed in enumerate(seeds, 1):

                def advance(loss: float, note: str = f"flow {number} of {len(seeds)}") -> None:
                    bar.advance(3 * batch, f"{note}, loss {loss:.3f}")

                own = self.seed * 1_000_003 + flow_seed
                options: dict[str, Any] = {"steps": steps, "batch": batch, "seed": own, "device": self.device}
                fits.append(fit_flow(self.images, self.whitening, **options, advance=advance))
                values.append(
                    self.frechet(self.samples(fits[-1], samples, own, shown if number == 1 else [], bar))
                )
        found = [value for value in values if value is not None]
        network = fits[0].network
        result: dict[str, Any] = {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "patch": network.patch,
            "tokens": math.prod(network.grid),
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
            failed = f"{len(values) - len(found)} of {len(values)} flows"
            result["missing"] = f"{failed} diverged, or what they drew decoded to no finite image"
        return result, image_grid([shown], columns=COLUMNS) if shown else None

    def samples(
        self, fitted: Fitted, count: int, seed: int, shown: list[Tensor], bar: Progress
    ) -> Iterator[Tensor | None]:
        """Decoded samples in parts, None if the flow diverged; adds the first to `shown`."""
        if fitted.diverged:
            yield None
            return
        for start in range(0, count, AT_A_TIME):
            part = min(AT_A_TIME, count - start)
            images = self.decode(draw(fitted.network, part, seed=seed, start=start))
            if images is not None and start < SHOWN:
                shown.extend(_shown(images[: SHOWN - start]))
            yield images
            bar.advance(EVALUATIONS * part, "drawing")

    def decode(self, whitened: Tensor) -> Tensor | None:
        """Whitened latents -> uint8 images on `device`, or None if they are not finite."""
        images = self.model.decode(self.whitening.restore(whitened.to(self.device)))
        return to_uint8(images) if bool(torch.isfinite(images).all()) else None

    def frechet(self, parts: Iterable[Tensor | None]) -> float | None:
        """Frechet distance of images, in parts, from the originals; None if a part is missing."""
        total = Moments.empty(self.extractor.dim)
        for part in parts:
            if part is None:
                return None
            total = total.merge(Moments.of(self.extractor(part)))
        return frechet_distance(self.originals, total)


def _shown(images: Tensor) -> list[Tensor]:
    """uint8 [B, C, H, W] -> RGB pictures [3, h, w] of at most 256 pixels."""
    pictures = as_rgb(images).cpu()
    if min(pictures.shape[-2:]) <= SHOWN_SIDE:
        return list(pictures.clone())
    return [resize_and_center_crop(picture, SHOWN_SIDE) for picture in pictures]

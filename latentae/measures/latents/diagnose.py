"""How encoder and decoder behave on a few images: equivariance, noise, half precision, and the way from one image to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentae.data.transforms import to_float, to_uint8
from latentae.errors import DataError, LatentAEError
from latentae.measures.latents.coding import Coder
from latentae.measures.latents.equivariance import equivariance
from latentae.measures.latents.half import audit_half
from latentae.measures.latents.mixing import mix_latents
from latentae.measures.latents.sensitivity import sensitivity
from latentae.models.base import Autoencoder
from latentae.models.latent_statistics import LatentStatistics

__all__ = ["STEPS", "Diagnosis", "diagnose"]

STEPS, MODE = 9, "spherical"


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found."""

    result: dict[str, Any]
    """Plain JSON values: `images`, `equivariance`, `sensitivity`, `half` and `interpolation`; what is not there says why."""
    strip: Tensor | None
    """uint8 [C, R, 9 R], the images decoded between the first and the last one; None of a single image."""


def diagnose(
    model: Autoencoder,
    images: Tensor,
    *,
    statistics: LatentStatistics,
    keys: Sequence[str],
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Diagnosis:
    """Look at a model from all sides, on images that are held in memory; 32 are enough.

    Costs about 8 times encoding and decoding them, and tracing the model. Interpolation is along the arc about the channels' means.

    Args:
        model: in evaluation mode, on `device`; outside `torch.inference_mode`.
        images: uint8 [N, C, R, R], R a multiple of f.
        statistics: of the latents over the whole data: their means are the centre of the arc, their deviations the units of noise.
        keys: of the images.
        batch_size: images at a time; changes speed and memory only.
        device: where the model is.
        seed: of the noise.

    Raises:
        DataError: no images, or another number of keys.
        ImageError: images the model can't take.
    """
    if not len(images) or len(images) != len(keys):
        raise DataError(
            f"a diagnosis got {len(images)} images and {len(keys)} keys; give at least one image, and a key for each"
        )
    coder = Coder(model, torch.device(device), batch_size)
    latents = torch.cat([coder.encode(to_float(images[part])) for part in coder.parts(len(images))])
    std = torch.tensor(statistics.summary()["latents_std"], dtype=torch.float64)
    strip, interpolation = _strip(coder, latents, keys, torch.from_numpy(statistics.mean))
    result = {
        "images": len(images),
        "equivariance": equivariance(coder, images, latents),
        "sensitivity": sensitivity(coder, images, latents, keys=keys, std=std, seed=seed),
        "half": _half(coder, images),
        "interpolation": interpolation,
    }
    return Diagnosis(result, strip)


def _half(coder: Coder, images: Tensor) -> dict[str, Any]:
    """The audit of half precision, or why there is none."""
    try:
        return audit_half(
            coder.model, (to_float(images[part]) for part in coder.parts(len(images)))
        ).to_json()
    except (
        LatentAEError,
        RuntimeError,
    ) as error:  # RuntimeError: an operator that this device has not in half precision
        return {"missing": next(iter(str(error).splitlines()), type(error).__name__)}


def _strip(
    coder: Coder, latents: Tensor, keys: Sequence[str], center: Tensor
) -> tuple[Tensor | None, dict[str, Any]]:
    """The way from the first image to the last."""
    facts = {"keys": [], "steps": STEPS, "mode": MODE}
    if len(latents) < 2:
        return None, {**facts, "missing": "it takes two images, and there is one"}
    middle = center.view(-1, 1, 1)
    between = [
        mix_latents(latents[0], latents[-1], step / (STEPS - 1), MODE, middle) for step in range(STEPS)
    ]
    made = coder.decode(torch.stack(between))
    if not made.isfinite().all():
        return None, {**facts, "missing": "the decoder gives NaN or infinite values between the two images"}
    return torch.cat(list(to_uint8(made)), dim=2), {**facts, "keys": [keys[0], keys[-1]]}

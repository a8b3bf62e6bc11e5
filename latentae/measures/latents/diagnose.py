"""Diagnosis on a few images: equivariance, noise, half precision and interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latentae.data.transforms import to_float, to_uint8
from latentae.errors import DataError, LatentAEError, first_line
from latentae.measures.latents.half import audit_half
from latentae.measures.latents.robustness import Coder, equivariance, sensitivity
from latentae.models.base import Autoencoder
from latentae.models.latent_statistics import LatentStatistics

__all__ = ["MODES", "STEPS", "diagnose", "mix_latents"]

STEPS, MODE = 9, "spherical"
MODES = ("linear", "spherical")


def diagnose(
    model: Autoencoder,
    images: Tensor,
    *,
    statistics: LatentStatistics,
    keys: Sequence[str],
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[dict[str, Any], Tensor | None]:
    """Diagnose a model on images in memory; 32 are enough.

    Costs about 8 times encoding and decoding them, and tracing the model. Interpolation follows the
    arc about the channel means.

    Args:
        model: in evaluation mode, on `device`; outside `torch.inference_mode`.
        images: uint8 [N, C, R, R], R a multiple of f.
        statistics: of the latents of all data; their means are the center of the arc, their
            deviations the unit of noise.
        keys: of the images.
        batch_size: images per batch; affects speed and memory only.
        device: where the model is.
        seed: of the noise.

    Returns:
        Plain JSON values `images`, `equivariance`, `sensitivity`, `half` and `interpolation`, with
        `missing` as the reason where one was not measured. And uint8 [C, R, 9 R], the images
        decoded between the first and the last one; None for one image.

    Raises:
        DataError: no images, or another number of keys.
        ImageError: images that the model can't take.
    """
    if not len(images) or len(images) != len(keys):
        raise DataError(
            f"a diagnosis got {len(images)} images and {len(keys)} keys; give at least one image, and a key "
            "for each"
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
    return result, strip


def _half(coder: Coder, images: Tensor) -> dict[str, Any]:
    batches = (to_float(images[part]) for part in coder.parts(len(images)))
    try:
        return audit_half(coder.model, batches).to_json()
    except (
        LatentAEError,
        RuntimeError,
    ) as error:  # RuntimeError: the device lacks an operator in half precision
        return {"missing": first_line(error)}


def _strip(
    coder: Coder, latents: Tensor, keys: Sequence[str], center: Tensor
) -> tuple[Tensor | None, dict[str, Any]]:
    """Images decoded between the first latent and the last."""
    facts = {"keys": [], "steps": STEPS, "mode": MODE}
    if len(latents) < 2:
        return None, {**facts, "missing": "it takes two images, and there is one"}
    shares, middle = (step / (STEPS - 1) for step in range(STEPS)), center.view(-1, 1, 1)
    between = [mix_latents(latents[0], latents[-1], share, MODE, middle) for share in shares]
    decoded = coder.decode(torch.stack(between))
    if not decoded.isfinite().all():
        return None, {**facts, "missing": "the decoder gives NaN or infinite values between the two images"}
    return torch.cat(list(to_uint8(decoded)), dim=2), {**facts, "keys": [keys[0], keys[-1]]}


def mix_latents(a: Tensor, b: Tensor, share: float, mode: str, center: float | Tensor = 0.0) -> Tensor:
    """Interpolate between two latents.

    "linear" is a + t (b - a). "spherical" is sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b about
    the center, with w the angle between the two (Shoemake 1985, "Animating rotation with quaternion
    curves", sec. 3.3). It is linear if w is 0 or 180 degrees, where the arc is not unique.

    Args:
        a: [z, h, w].
        b: the same.
        share: t, from 0 for `a` to 1 for `b`.
        mode: one of `MODES`.
        center: center of the arc, a number or a tensor such as the channel means [z, 1, 1].
    """
    if mode == "linear":
        return torch.lerp(a, b, share)
    x, y = a.double() - center, b.double() - center
    cosine = (x * y).sum() / (x.norm() * y.norm()).clamp_min(1e-300)
    angle = cosine.clamp(-1, 1).acos()
    if angle.sin() < 1e-6:
        return torch.lerp(a, b, share)
    mixed = ((1 - share) * angle).sin() / angle.sin() * x + (share * angle).sin() / angle.sin() * y
    return (mixed + center).to(a.dtype)

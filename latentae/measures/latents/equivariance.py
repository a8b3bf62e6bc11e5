"""How far encoder and decoder commute with shrinking and turning the image: a diagnosis of the latent space, not a ranking."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentae.data.transforms import to_float, to_uint8
from latentae.errors import LatentAEError
from latentae.losses.equivariance import Transform
from latentae.measures.latents.coding import Coder, finite_mean, reconstruction_psnr

__all__ = ["TRANSFORMS", "equivariance"]

TRANSFORMS = {
    "scale 0.25": Transform(0.25, 0),
    "scale 0.5": Transform(0.5, 0),
    "scale 0.75": Transform(0.75, 0),
    "rotation 90": Transform(1.0, 1),
}
TOLERANCE = 0.1  # of a scale: a latent has whole places only, and 0.25 of 14 of them is rather 0.29
ROUNDING = 1e-14  # share of the mean square of fp32 numbers below which their variance is rounding


def equivariance(coder: Coder, images: Tensor, latents: Tensor) -> list[dict[str, Any]]:
    """Measure each of `TRANSFORMS` on a few images.

    `encoder_error` is sum |E(Tx) - T E(x)|^2 / sum |E(Tx) - m|^2 over all images, E the posterior mean and m the channels' means of
    E(Tx): 0 is a latent that is transformed as its image is, 1 one that says no more of E(Tx) than its mean. `decoder_psnr` is that of
    D(T E(x)) against Tx in dB, both rounded to 8 bits, averaged over images. T is antialiased bilinear (Kouzelis et al. 2025, arXiv
    2502.09509; see `latentae.losses.equivariance`).

    Args:
        coder: the model.
        images: uint8 [N, C, R, R].
        latents: their posterior means, fp32 [N, z, h, w].

    Returns:
        For each transform a name and both numbers as plain JSON values, null where they don't exist; or the name and `missing`, why
        it was not measured.
    """
    rows = []
    for name, transform in TRANSFORMS.items():
        reason = _obstacle(transform, latents)
        if reason is None:
            try:
                rows.append({"transform": name, **_measure(coder, transform, images, latents)})
                continue
            except (
                LatentAEError,
                RuntimeError,
            ) as error:  # layers may have a smallest size, and say so each in its own way
                reason = (
                    f"the model can't take it: {next(iter(str(error).splitlines()), type(error).__name__)}"
                )
        rows.append({"transform": name, "missing": reason})
    return rows


def _obstacle(transform: Transform, latents: Tensor) -> str | None:
    """Why latents of this size have no such transform."""
    height, width = latents.shape[2:]
    for side in (height, width):
        wanted = transform.scale * side
        if abs(max(1, round(wanted)) - wanted) > TOLERANCE * wanted:
            return f"the latents have {height} x {width} places, and {transform.scale:g} of {side} is not near a whole number"
    return None


def _measure(coder: Coder, transform: Transform, images: Tensor, latents: Tensor) -> dict[str, float | None]:
    f = coder.model.config.downsampling
    distance, encoded, values = 0.0, [], []
    for part in coder.parts(len(images)):
        x, z = transform.image(to_float(images[part]), f), transform.latent(latents[part])
        mean = coder.encode(x).double()
        distance += float((mean - z.double()).square().sum())
        encoded.append(mean)
        values += reconstruction_psnr(coder.decode(z), to_uint8(x))
    means = torch.cat(encoded)
    spread = float((means - means.mean((0, 2, 3), keepdim=True)).square().sum())
    varies = spread > ROUNDING * float(means.square().sum())  # not where one is NaN
    return {
        "encoder_error": finite_mean([distance / spread]) if varies else None,
        "decoder_psnr": finite_mean(values),
    }

"""How encoder and decoder respond to transformed images and noisy latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentae import keyed
from latentae.data.transforms import to_float, to_uint8
from latentae.errors import LatentAEError, first_line
from latentae.keyed import whole_seed
from latentae.losses.equivariance import Transform
from latentae.measures.metrics import finite_mean, psnr
from latentae.models.base import Autoencoder

__all__ = ["NOISES", "TRANSFORMS", "Coder", "equivariance", "sensitivity"]

NOISES = (0.1, 0.3, 1.0)
TRANSFORMS = {
    "scale 0.25": Transform(0.25, 0),
    "scale 0.5": Transform(0.5, 0),
    "scale 0.75": Transform(0.75, 0),
    "rotation 90": Transform(1.0, 1),
}
TOLERANCE = 0.1  # of a scale: 0.25 of 14 latent pixels is rounded to 4, a scale of 0.29
ROUNDING = 1e-14  # variance of fp32 rounding errors as a share of the mean square


@dataclass(frozen=True)
class Coder:
    """Encodes and decodes tensors on the CPU, a batch at a time, with a model on any device.

    Attributes:
        model: in evaluation mode, on `device`.
        device: where the model is.
        batch_size: images per batch.
    """

    model: Autoencoder
    device: torch.device
    batch_size: int

    def parts(self, count: int) -> list[slice]:
        """`count` images divided into batches."""
        return [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Posterior means fp32 [B, z, h, w] of images [B, C, H, W] in [-1, 1]."""
        return torch.cat(
            [self.model.encode(images[p].to(self.device)).mean.float().cpu() for p in self.parts(len(images))]
        )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images fp32 [B, C, H, W], about [-1, 1], of raw latents [B, z, h, w]."""
        return torch.cat(
            [self.model.decode(latents[p].to(self.device)).float().cpu() for p in self.parts(len(latents))]
        )


def equivariance(coder: Coder, images: Tensor, latents: Tensor) -> list[dict[str, Any]]:
    """Measure how far encoder and decoder commute with each of `TRANSFORMS`.

    `encoder_error` is sum |E(Tx) - T E(x)|^2 / sum |E(Tx) - m|^2 over all images, with E the
    posterior mean and m the channel means of E(Tx). It is 0 for a latent that is transformed like
    its image, and 1 if T E(x) predicts E(Tx) no better than the mean does. `decoder_psnr` compares
    D(T E(x)) with Tx in dB, both rounded to 8 bits, averaged over images. T is antialiased bilinear
    (Kouzelis et al. 2025, arXiv 2502.09509; see `latentae.losses.equivariance`).

    Args:
        coder: the model.
        images: uint8 [N, C, R, R].
        latents: their posterior means, fp32 [N, z, h, w].

    Returns:
        For each transform its name and both numbers as plain JSON values, null where they do not
        exist; or its name and `missing`, the reason why it was not measured.
    """
    rows = []
    for name, transform in TRANSFORMS.items():
        row: dict[str, Any] = {"missing": _obstacle(transform, latents)}
        if row["missing"] is None:
            try:
                row = _commutation(coder, transform, images, latents)
            except (LatentAEError, RuntimeError) as error:  # RuntimeError: a layer refuses small inputs
                row = {"missing": f"the model can't take it: {first_line(error)}"}
        rows.append({"transform": name, **row})
    return rows


def _obstacle(transform: Transform, latents: Tensor) -> str | None:
    """Why latents of this size have no such transform."""
    height, width = latents.shape[2:]
    for side in (height, width):
        wanted = transform.scale * side
        if abs(max(1, round(wanted)) - wanted) > TOLERANCE * wanted:
            size = f"the latents have {height} x {width} places"
            return f"{size}, and {transform.scale:g} of {side} is not near a whole number"
    return None


def _commutation(
    coder: Coder, transform: Transform, images: Tensor, latents: Tensor
) -> dict[str, float | None]:
    f = coder.model.config.downsampling
    distance, encoded, values = 0.0, [], []
    for part in coder.parts(len(images)):
        x, z = transform.image(to_float(images[part]), f), transform.latent(latents[part])
        mean = coder.encode(x).double()
        distance += float((mean - z.double()).square().sum())
        encoded.append(mean)
        values += _psnr(coder.decode(z), to_uint8(x))
    means = torch.cat(encoded)
    spread = float((means - means.mean((0, 2, 3), keepdim=True)).square().sum())
    varies = spread > ROUNDING * float(means.square().sum())  # False if one is NaN
    return {
        "encoder_error": finite_mean([distance / spread]) if varies else None,
        "decoder_psnr": finite_mean(values),
    }


def sensitivity(
    coder: Coder, images: Tensor, latents: Tensor, *, keys: Sequence[str], std: Tensor, seed: int = 0
) -> list[dict[str, Any]]:
    """Measure the PSNR of images decoded from noisy latents.

    The latents of a diffusion model are never exactly the encoder's.

    A noise level t decodes z + t std eps, with z the posterior mean and std that of each channel.
    The standard normal eps depends only on the image's key and the seed, and is the same at all
    levels.

    Args:
        coder: the model.
        images: uint8 [N, C, R, R].
        latents: their posterior means, fp32 [N, z, h, w].
        keys: of the images.
        std: [z], of the sampled latent over the data.
        seed: of the noise.

    Returns:
        For each level `noise`; `psnr` in dB against the original image, averaged over images; and
        `drop`, the loss of PSNR against no noise, over the images where both are finite. Plain JSON
        values, null where they do not exist.
    """
    values: dict[float, list[float]] = {level: [] for level in (0.0, *NOISES)}
    for part in coder.parts(len(images)):
        generators = [keyed.generator("sensitivity", whole_seed(seed), key) for key in keys[part]]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        noise = noise * std.float().view(1, -1, 1, 1)
        for level, found in values.items():
            found += _psnr(coder.decode(latents[part] + level * noise), images[part])
    rows = []
    for level in NOISES:
        drops = [exact - noisy for exact, noisy in zip(values[0.0], values[level], strict=True)]
        rows.append({"noise": level, "psnr": finite_mean(values[level]), "drop": finite_mean(drops)})
    return rows


def _psnr(decoded: Tensor, images: Tensor) -> list[float]:
    """PSNR in dB of float images against uint8 ones; infinite if equal, NaN if not finite."""
    bad = ~decoded.isfinite().flatten(1).all(1)
    return psnr(to_uint8(decoded.nan_to_num()), images).masked_fill(bad, math.nan).tolist()

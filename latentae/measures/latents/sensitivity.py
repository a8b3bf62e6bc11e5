"""How much noise in the latent the decoder takes: a diffusion model's latents are never quite the encoder's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latentae import keyed
from latentae.keyed import whole_seed
from latentae.measures.latents.coding import Coder, finite_mean, reconstruction_psnr

__all__ = ["NOISES", "sensitivity"]

NOISES = (0.1, 0.3, 1.0)


def sensitivity(
    coder: Coder, images: Tensor, latents: Tensor, *, keys: Sequence[str], std: Tensor, seed: int = 0
) -> list[dict[str, Any]]:
    """PSNR of images decoded from latents with noise, at three levels.

    A level t decodes z + t std eps, z the posterior mean and std that of each channel. The standard normal eps of an image is a function
    of its key and the seed alone, and the same at all levels.

    Args:
        coder: the model.
        images: uint8 [N, C, R, R].
        latents: their posterior means, fp32 [N, z, h, w].
        keys: of the images.
        std: [z], of the sampled latent over the data.
        seed: of the noise.

    Returns:
        For each level `noise`; `psnr` in dB against the original image, averaged over images; and `drop`, how much less that is than
        without noise, over the images where both are finite. Plain JSON values, null where they don't exist.
    """
    values: dict[float, list[float]] = {level: [] for level in (0.0, *NOISES)}
    spread = std.float().view(1, -1, 1, 1)
    for part in coder.parts(len(images)):
        noise = torch.stack([_noise(latents.shape[1:], key, seed) for key in keys[part]]) * spread
        for level, found in values.items():
            found += reconstruction_psnr(coder.decode(latents[part] + level * noise), images[part])
    rows = []
    for level in NOISES:
        drops = [exact - noisy for exact, noisy in zip(values[0.0], values[level], strict=True)]
        rows.append({"noise": level, "psnr": finite_mean(values[level]), "drop": finite_mean(drops)})
    return rows


def _noise(shape: Sequence[int], key: str, seed: int) -> Tensor:
    generator = keyed.generator("sensitivity", whole_seed(seed), key)
    return torch.randn(tuple(shape), generator=generator)

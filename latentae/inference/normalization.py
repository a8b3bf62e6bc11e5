"""Raw latents to those of a diffusion model and back, in the formulas of the pipelines that read the same config."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentae.errors import ModelError
from latentae.models.config import AutoencoderConfig

__all__ = ["Normalization"]


@dataclass(frozen=True)
class Normalization:
    """A diffusion model sees `(z - shift) * scale` of a raw latent z."""

    shift: Tensor
    """[z or 1, 1, 1] fp32."""
    scale: Tensor
    """[z or 1, 1, 1] fp32."""

    @classmethod
    def of(cls, config: AutoencoderConfig) -> Normalization:
        """What a config asks for.

        (z - shift_factor) * scaling_factor, as in SD3 and Flux (with shift_factor 0 also SD's and DiT's). Where latents_mean and
        latents_std are both given, (z - latents_mean) * scaling_factor / latents_std, as in SDXL (with scaling_factor 1 also
        Wan's); shift_factor has no part in that.

        Raises:
            ModelError: mean and std are not one number a channel, or a std is not positive.
        """
        mean: tuple[float, ...] | None = getattr(config, "latents_mean", None)
        std: tuple[float, ...] | None = getattr(config, "latents_std", None)
        channels = config.latent_channels
        if mean is None or std is None:
            return cls(
                torch.tensor(config.shift_factor).view(1, 1, 1),
                torch.tensor(config.scaling_factor).view(1, 1, 1),
            )
        if not len(mean) == len(std) == channels or not all(value > 0 for value in std):
            raise ModelError(
                f"the config has {len(mean)} latents_mean and {len(std)} latents_std (lowest {min(std, default=0.0):g}), expected "
                f"{channels} of each and each std above 0; correct config.json"
            )
        return cls(
            torch.tensor(mean).view(-1, 1, 1), config.scaling_factor / torch.tensor(std).view(-1, 1, 1)
        )

    def apply(self, raw: Tensor) -> Tensor:
        """Raw latents [..., z, h, w] -> those of a diffusion model."""
        return (raw - self.shift.to(raw.device)) * self.scale.to(raw.device)

    def undo(self, latents: Tensor) -> Tensor:
        """Latents of a diffusion model [..., z, h, w] -> raw ones."""
        return latents / self.scale.to(latents.device) + self.shift.to(latents.device)

"""Latents of images of any sizes, with the sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from latentae.errors import ImageError

__all__ = ["Latents"]


@dataclass(frozen=True, repr=False)
class Latents:
    """One latent for each image, in order, and the size that each image had.

    An image that the model's factor f does not divide was padded, so the size is what cropping back needs.
    """

    tensors: tuple[Tensor, ...]
    """Each [z, h, w] fp32, as a diffusion model sees it."""
    sizes: tuple[tuple[int, int], ...]
    """Height and width in pixels of each image."""

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> Tensor:
        return self.tensors[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def batch(self) -> Tensor:
        """All of them as one tensor, [B, z, h, w].

        Raises:
            ImageError: they are of different sizes, or there are none.
        """
        shapes = sorted({tuple(latent.shape) for latent in self.tensors})
        if len(shapes) != 1:
            found = " and ".join(" x ".join(map(str, shape)) for shape in shapes) or "no latent"
            raise ImageError(
                f"found {found}, expected latents of one size; make the images one size, or take them one by one"
            )
        return torch.stack(self.tensors)

    def to(self, device: str | torch.device) -> Latents:
        """The same on another device."""
        return Latents(tuple(latent.to(device) for latent in self.tensors), self.sizes)

    def __repr__(self) -> str:
        parts = [
            f"{' x '.join(map(str, latent.shape))} of {height} x {width} pixels"
            for latent, (height, width) in zip(self.tensors, self.sizes, strict=True)
        ]
        more = f", and {len(parts) - 4} more" if len(parts) > 4 else ""
        return f"Latents({len(parts)}: {', '.join(parts[:4])}{more})"

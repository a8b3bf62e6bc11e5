"""The perceptual distance of an evaluation, chosen by name or by the weights on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentae.data.transforms import to_float
from latentae.errors import ImageError, WeightsError
from latentae.losses.options import PerceptualNet
from latentae.losses.perceptual import FrozenDistance, build_perceptual, perceptual_available
from latentae.options import PerceptualName

__all__ = ["Distance", "choose_distance"]

PREFERENCE: tuple[PerceptualNet, ...] = (
    "alex",
    "vgg",
    "efficientnet-lite0",
)  # LPIPS's authors measure with alex


@dataclass(frozen=True)
class Distance:
    """A perceptual distance, or the reason why there is none.

    Attributes:
        module: (x, y in [-1, 1], [B, 3, H, W]) -> [B]; None if there is none.
        name: name in reports with the backbone, such as "LPIPS (vgg)".
        reason: why it was chosen, or why there is none.
    """

    module: FrozenDistance | None
    name: str | None
    reason: str

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each image, fp64 [B]; x and y are uint8 [B, 3, H, W]."""
        return self.between(x, self.seen(y))

    def seen(self, images: Tensor) -> Sequence[Tensor]:
        """Features of uint8 [B, 3, H, W] for `between`, so that they are computed once."""
        return [] if self.module is None else self.module.features(to_float(images))

    def between(self, images: Tensor, seen: Sequence[Tensor]) -> Tensor:
        """Distance of uint8 images [B, 3, H, W] from those that `seen` came from, fp64 [B]."""
        if self.module is None:
            raise WeightsError(f"there is no perceptual distance: {self.reason}")
        return self.module.distance(self.module.features(to_float(images)), seen).double()


def choose_distance(net: PerceptualName, resolution: int, device: torch.device | str = "cpu") -> Distance:
    """Build a perceptual distance.

    Args:
        net: a network of `latentae.losses.perceptual`, "none", or "auto": LPIPS if its weights are
            on this machine, else the EfficientNet-Lite0 distance if its package is installed, else
            none.
        resolution: side of the images in pixels.
        device: where it runs.

    Raises:
        WeightsError, MissingDependencyError: the weights of a named network can't be loaded.
        ImageError: the images are too small for a named network.
    """
    if net == "none":
        return Distance(None, None, "not asked for")
    known = ", ".join(PREFERENCE)
    if net == "auto":
        for candidate in filter(perceptual_available, PREFERENCE):
            module = build_perceptual(candidate)
            if module.minimum_size <= resolution:
                return Distance(module.to(device), module.name, f"the first of {known} that this machine has")
        return Distance(
            None, None, f"this machine has the weights of none of {known} for {resolution}-pixel images"
        )
    module = build_perceptual(net)
    if resolution < module.minimum_size:
        raise ImageError(
            f"{module.name} needs sides of at least {module.minimum_size} pixels, got {resolution}; use "
            "another one"
        )
    return Distance(module.to(device), module.name, "asked for")

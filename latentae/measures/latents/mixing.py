"""Latents between two latents."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MODES", "mix_latents"]

MODES = ("linear", "spherical")


def mix_latents(a: Tensor, b: Tensor, share: float, mode: str, center: float | Tensor = 0.0) -> Tensor:
    """A latent between two.

    "linear" is a + t (b - a). "spherical" is sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b about the centre, w the angle between the two
    (Shoemake 1985, "Animating rotation with quaternion curves", sec. 3.3); linear where w is 0 or 180 degrees, which leaves the arc open.

    Args:
        a: [z, h, w].
        b: the same.
        share: t, 0 is `a` and 1 is `b`.
        mode: one of `MODES`.
        center: what is subtracted first, and added again; a number, or a tensor such as the channels' means [z, 1, 1].
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

"""Interpolation between two latents."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MODES", "mix_latents"]

MODES = ("linear", "spherical")


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

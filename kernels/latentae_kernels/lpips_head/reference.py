"""Plain-torch definition of `lpips_head` and the closed form of its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import compute_dtype

__all__ = ["lpips_head_gradients", "lpips_head_reference", "unit"]


def lpips_head_reference(a: Tensor, b: Tensor, weight: Tensor, eps: float = 1e-10) -> Tensor:
    """Weighted squared difference of channel-normalized features, averaged over pixels (Zhang et
    al. 2018, eq. 1).

    Args:
        a, b: feature maps [N, C, H, W].
        weight: [C].
        eps: added to the squared norm, inside the root: the gradient of a plain norm at zero is
            NaN.

    Returns:
        [N] in fp32, or in fp64 for fp64 features.
    """
    u, v = unit(a, eps)[0], unit(b, eps)[0]
    return (weight.to(u.dtype).view(1, -1, 1, 1) * (u - v).square()).sum(dim=1).mean(dim=(1, 2))


def lpips_head_gradients(
    gradient: Tensor, a: Tensor, b: Tensor, weight: Tensor, eps: float, needs_a: bool, needs_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Closed form of lpips_head's gradient; it recomputes the norms, so its derivative is the
    second derivative.

    With u = a r0, v = b r1 and e = 2 g w (u - v) / HW: da = r0 (e - u sum_c(e u)), db = -r1 (e - v
    sum_c(e v)).

    Returns:
        da and db in the dtype of `a`, None where not needed.
    """
    (u, r0), (v, r1) = unit(a, eps), unit(b, eps)
    scale = gradient.to(u.dtype).view(-1, 1, 1, 1) * weight.to(u.dtype).view(1, -1, 1, 1)
    e = (2 / a.shape[2:].numel()) * scale * (u - v)
    da = (r0 * (e - u * (e * u).sum(dim=1, keepdim=True))).to(a.dtype) if needs_a else None
    db = (r1 * (v * (e * v).sum(dim=1, keepdim=True) - e)).to(b.dtype) if needs_b else None
    return da, db


def unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Features of unit length over channels, and 1 / length, in the compute dtype."""
    x = x.to(compute_dtype(x))
    scale = torch.rsqrt(x.square().sum(dim=1, keepdim=True) + eps)
    return x * scale, scale

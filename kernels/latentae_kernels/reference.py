"""Plain-torch definitions of every op: what a kernel must equal, computed in at least fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "lpips_head_gradients",
    "lpips_head_reference",
    "norm_act_gradients",
    "norm_act_reference",
    "row_norm_act_gradients",
    "row_norm_act_reference",
]


def norm_act_reference(
    x: Tensor,  # [N, C, *spatial]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    groups: int,
    eps: float = 1e-6,
    act: str = "silu",
    pre_bias: Tensor | None = None,  # [C]
    residual: Tensor | None = None,  # like x
) -> Tensor | tuple[Tensor, Tensor]:
    """GroupNorm (Wu & He 2018, eq. 1 and 2) of `x + pre_bias + residual`, then the activation, written out term by term.

    Maths runs in the wider of fp32 and the input's dtype, so fp64 stays fp64. The sum with a residual is rounded to the dtype of
    `x` before it is normalized: it is an output, and the statistics are those of what is stored.

    Returns:
        y, or (y, x + pre_bias + residual) when there is a residual; both in the dtype of `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    channels = (1, -1) + (1,) * (x.ndim - 2)
    total = x.to(wide)
    if pre_bias is not None:
        total = total + pre_bias.to(wide).view(channels)
    if residual is not None:
        total = (total + residual.to(wide)).to(x.dtype).to(wide)
    grouped = total.reshape(x.shape[0], groups, -1) if x.numel() else total.reshape(x.shape[0], groups, 0)
    centred = grouped - grouped.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    z = (centred * torch.rsqrt(variance + eps)).reshape(x.shape)
    z = z * weight.to(wide).view(channels) + bias.to(wide).view(channels)
    y = (z * torch.sigmoid(z) if act == "silu" else z).to(x.dtype)
    return y if residual is None else (y, total.to(x.dtype))


def norm_act_gradients(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,  # what was normalized, before pre_bias
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    pre_bias: Tensor | None,  # [C]
    groups: int,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The closed form of norm_act's gradient, statistics included, so that differentiating it gives the second derivatives.

    With xh = (x - mean) / std, z = gamma xh + beta, dz = dy act'(z), A and B the means over a group of gamma dz and gamma dz xh:
    dx = (gamma dz - A - B xh) / std (+ dtotal), dgamma = sum dz xh, dbeta = sum dz (Wu & He 2018, differentiated).

    Returns:
        dx in the dtype of `x`; dgamma, dbeta and the sum of dx over samples and pixels, [C], in the precision of the maths.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    channels = (1, -1) + (1,) * (x.ndim - 2)
    grouped = (x.shape[0], groups, -1) if x.numel() else (x.shape[0], groups, 0)
    others = [0, *range(2, x.ndim)]
    value, gamma = x.to(wide), weight.to(wide).view(channels)
    if pre_bias is not None:
        value = value + pre_bias.to(wide).view(channels)
    centred = value.reshape(grouped)
    centred = centred - centred.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    xh = centred * rstd
    xh_full = xh.reshape(x.shape)
    dz = dy.to(wide)
    if act == "silu":
        z = gamma * xh_full + bias.to(wide).view(channels)
        s = torch.sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    scaled = (gamma * dz).reshape(grouped)
    a, b = scaled.mean(dim=-1, keepdim=True), (scaled * xh).mean(dim=-1, keepdim=True)
    dx = (rstd * (scaled - a - xh * b)).reshape(x.shape)
    if dtotal is not None:
        dx = dx + dtotal.to(wide)
    return dx.to(x.dtype), (dz * xh_full).sum(others), dz.sum(others), dx.sum(others)


def row_norm_act_reference(
    x: Tensor,  # [N, C, *spatial]
    weight: Tensor,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-6,
    norm: str = "rms",
    act: str = "silu",
) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019, eq. 4) or LayerNorm (Ba et al. 2016, eq. 4) over the channels of each pixel, then the activation.

    Maths runs in the wider of fp32 and the input's dtype, so fp64 stays fp64.

    Returns:
        y in the dtype of `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    z = _channels(weight, x) * _row_normalized(x.to(wide), eps, norm)[0]
    if bias is not None:
        z = z + _channels(bias, x)
    return (z * torch.sigmoid(z) if act == "silu" else z).to(x.dtype)


def row_norm_act_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: str, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The closed form of row_norm_act's gradient, statistics included, so that differentiating it gives the second derivatives.

    With xh the normalized row, z = gamma xh + beta, dz = dy act'(z) and means over channels:
    dx = (gamma dz - mean(gamma dz) - xh mean(gamma dz xh)) / std, without the first mean for "rms"; dgamma = sum dz xh, dbeta = sum dz.

    Returns:
        dx in the dtype of `x`; dgamma and dbeta [C] in the precision of the maths.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    gamma, dz = _channels(weight, x), dy.to(wide)
    xh, rstd = _row_normalized(x.to(wide), eps, norm)
    if act == "silu":
        z = gamma * xh if bias is None else gamma * xh + _channels(bias, x)
        s = torch.sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    scaled = gamma * dz
    dx = scaled - xh * (scaled * xh).mean(dim=1, keepdim=True)
    if norm == "layer":
        dx = dx - scaled.mean(dim=1, keepdim=True)
    others = [0, *range(2, x.ndim)]
    return (dx * rstd).to(x.dtype), (dz * xh).sum(others), dz.sum(others)


def _channels(vector: Tensor, x: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...], in the precision of the maths."""
    return vector.to(torch.promote_types(x.dtype, torch.float32)).view((1, -1) + (1,) * (x.ndim - 2))


def _row_normalized(x: Tensor, eps: float, norm: str) -> tuple[Tensor, Tensor]:
    """x / std over channels, centred for "layer", and 1 / std."""
    if norm == "layer":
        x = x - x.mean(dim=1, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps)
    return x * rstd, rstd


def lpips_head_reference(a: Tensor, b: Tensor, weight: Tensor, eps: float = 1e-10) -> Tensor:
    """Weighted squared difference of channel-normalized features, averaged over pixels (Zhang et al. 2018, eq. 1).

    Args:
        a, b: feature maps [N, C, H, W].
        weight: [C].
        eps: added to the squared norm, inside the root: the gradient of a plain norm at zero is NaN.

    Returns:
        [N] in the wider of fp32 and the input's dtype, in which the maths runs too.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    u, v = (t.to(wide) * torch.rsqrt(t.to(wide).square().sum(dim=1, keepdim=True) + eps) for t in (a, b))
    return (_channels(weight, a) * (u - v).square()).sum(dim=1).mean(dim=(1, 2))


def lpips_head_gradients(
    gradient: Tensor, a: Tensor, b: Tensor, weight: Tensor, eps: float, needs_a: bool, needs_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The closed form of lpips_head's gradient, norms included, so that differentiating it gives the second derivatives.

    With u = a r0, v = b r1 and e = 2 g w (u - v) / HW: da = r0 (e - u sum_c(e u)), db = -r1 (e - v sum_c(e v)).

    Returns:
        da and db in the dtype of `a`, None where not needed.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    r0, r1 = (torch.rsqrt(t.to(wide).square().sum(dim=1, keepdim=True) + eps) for t in (a, b))
    u, v = a.to(wide) * r0, b.to(wide) * r1
    e = (2 / math.prod(a.shape[2:])) * gradient.to(wide).view(-1, 1, 1, 1) * _channels(weight, a) * (u - v)
    da = (r0 * (e - u * (e * u).sum(dim=1, keepdim=True))).to(a.dtype) if needs_a else None
    db = (r1 * (v * (e * v).sum(dim=1, keepdim=True) - e)).to(b.dtype) if needs_b else None
    return da, db

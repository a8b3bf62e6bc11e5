"""Plain-torch definition of `norm_act` and the closed form of its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import compute_dtype

__all__ = ["norm_act_gradients", "norm_act_reference"]


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
    """GroupNorm (Wu & He 2018, eq. 1 and 2) of `x + pre_bias + residual`, then the activation.

    The arithmetic is in fp32, or in fp64 for fp64 inputs. The sum with a residual is rounded to the
    dtype of `x` before it is normalized: it is an output, and the statistics describe what is
    stored.

    Returns:
        y, or (y, x + pre_bias + residual) with a residual, both in the dtype of `x`.
    """
    wide, channels = compute_dtype(x), _channels_shape(x)
    total = x.to(wide)
    if pre_bias is not None:
        total = total + pre_bias.to(wide).view(channels)
    if residual is not None:
        total = (total + residual.to(wide)).to(x.dtype).to(wide)
    z = _normalized(total, groups, eps)[0].reshape(x.shape)
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
    """Closed form of norm_act's gradient; it recomputes the statistics, so its derivative is the
    second derivative.

    With xh = (x - mean) / std, z = gamma xh + beta, dz = dy act'(z), A and B the means over a group
    of gamma dz and gamma dz xh: dx = (gamma dz - A - B xh) / std (+ dtotal), dgamma = sum dz xh,
    dbeta = sum dz.

    Returns:
        dx in the dtype of `x`; dgamma, dbeta and the sum of dx over samples and pixels, [C], in the
        compute dtype.
    """
    wide, channels = compute_dtype(x), _channels_shape(x)
    others = [0, *range(2, x.ndim)]
    value, gamma = x.to(wide), weight.to(wide).view(channels)
    if pre_bias is not None:
        value = value + pre_bias.to(wide).view(channels)
    xh, rstd = _normalized(value, groups, eps)
    xh_full = xh.reshape(x.shape)
    dz = dy.to(wide)
    if act == "silu":
        z = gamma * xh_full + bias.to(wide).view(channels)
        s = torch.sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    scaled = (gamma * dz).reshape(xh.shape)
    a, b = scaled.mean(dim=-1, keepdim=True), (scaled * xh).mean(dim=-1, keepdim=True)
    dx = (rstd * (scaled - a - xh * b)).reshape(x.shape)
    if dtotal is not None:
        dx = dx + dtotal.to(wide)
    return dx.to(x.dtype), (dz * xh_full).sum(others), dz.sum(others), dx.sum(others)


def _channels_shape(x: Tensor) -> tuple[int, ...]:
    """[1, C, 1, ...]: the shape in which a channel vector broadcasts over `x`."""
    return (1, -1) + (1,) * (x.ndim - 2)


def _normalized(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / std as [N, groups, elements] and 1 / std [N, groups, 1]."""
    grouped = x.reshape(x.shape[0], groups, x[:1].numel() // groups)
    centered = grouped - grouped.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(dim=-1, keepdim=True) + eps)
    return centered * rstd, rstd

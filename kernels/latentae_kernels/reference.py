"""Plain-torch definitions of every op: what a kernel must equal, computed in at least fp32."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["norm_act_reference"]


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

    Maths runs in the wider of fp32 and the input's dtype, so fp64 stays fp64.

    Returns:
        y, or (y, x + pre_bias + residual) when there is a residual; both in the dtype of `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    channels = (1, -1) + (1,) * (x.ndim - 2)
    total = x.to(wide)
    if pre_bias is not None:
        total = total + pre_bias.to(wide).view(channels)
    if residual is not None:
        total = total + residual.to(wide)
    grouped = total.reshape(x.shape[0], groups, -1) if x.numel() else total.reshape(x.shape[0], groups, 0)
    centred = grouped - grouped.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    z = (centred * torch.rsqrt(variance + eps)).reshape(x.shape)
    z = z * weight.to(wide).view(channels) + bias.to(wide).view(channels)
    y = (z * torch.sigmoid(z) if act == "silu" else z).to(x.dtype)
    return y if residual is None else (y, total.to(x.dtype))

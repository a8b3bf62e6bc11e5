"""Plain-torch definitions of the ops, which every backend must equal with both derivatives.

The arithmetic is in fp32, or in fp64 for fp64 inputs. The arguments are those of the ops.
"""

from __future__ import annotations

import torch
from torch import Tensor


def norm_act_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-6,
    act: str = "silu",
    pre_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """GroupNorm (Wu & He 2018, eq. 1 and 2) of `x + pre_bias + residual`, then the activation.

    The sum with a residual is rounded to the dtype of `x` before it is normalized: it is an output,
    and the statistics describe what is stored.
    """
    total = _wide(x)
    if pre_bias is not None:
        total = total + _channels(pre_bias, x)
    if residual is not None:
        total = _wide((total + _wide(residual)).to(x.dtype))
    grouped = total.reshape(x.shape[0], groups, x[:1].numel() // groups)
    centered = grouped - grouped.mean(dim=-1, keepdim=True)
    z = centered * torch.rsqrt(centered.square().mean(dim=-1, keepdim=True) + eps)
    y = _activated(z.reshape(x.shape) * _channels(weight, x) + _channels(bias, x), act).to(x.dtype)
    return y if residual is None else (y, total.to(x.dtype))


def row_norm_act_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "rms",
    act: str = "silu",
) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019, eq. 4) or LayerNorm (Ba et al. 2016, eq. 4) of each pixel,
    then the activation.
    """
    wide = _wide(x)
    if norm == "layer":
        wide = wide - wide.mean(dim=1, keepdim=True)
    z = _channels(weight, x) * wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + eps)
    return _activated(z if bias is None else z + _channels(bias, x), act).to(x.dtype)


def lpips_head_reference(a: Tensor, b: Tensor, weight: Tensor, eps: float = 1e-10) -> Tensor:
    """Weighted squared difference of features of unit length, averaged over pixels (Zhang et al.
    2018, eq. 1).
    """
    u, v = (_wide(x) * torch.rsqrt(_wide(x).square().sum(dim=1, keepdim=True) + eps) for x in (a, b))
    return (_channels(weight, a) * (u - v).square()).sum(dim=1).mean(dim=(1, 2))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _channels(vector: Tensor, x: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...], in the dtype of the arithmetic on `x`."""
    return vector.to(_wide(x).dtype).view((1, -1) + (1,) * (x.ndim - 2))


def _activated(z: Tensor, act: str) -> Tensor:
    return z * torch.sigmoid(z) if act == "silu" else z

"""Plain-torch definition of `row_norm_act` and the closed form of its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import compute_dtype

__all__ = ["row_norm_act_gradients", "row_norm_act_reference"]


def row_norm_act_reference(
    x: Tensor,  # [N, C, *spatial]
    weight: Tensor,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-6,
    norm: str = "rms",
    act: str = "silu",
) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019, eq. 4) or LayerNorm (Ba et al. 2016, eq. 4) per pixel, then
    the activation.

    The arithmetic is in fp32, or in fp64 for fp64 inputs.

    Returns:
        y in the dtype of `x`.
    """
    z = _channels(weight, x) * _normalized(x, eps, norm)[0]
    if bias is not None:
        z = z + _channels(bias, x)
    return (z * torch.sigmoid(z) if act == "silu" else z).to(x.dtype)


def row_norm_act_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: str, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Closed form of row_norm_act's gradient; it recomputes the statistics, so its derivative is
    the second derivative.

    With xh the normalized row, z = gamma xh + beta, dz = dy act'(z) and means over channels:
    dx = (gamma dz - mean(gamma dz) - xh mean(gamma dz xh)) / std, without the first mean for "rms";
    dgamma = sum dz xh, dbeta = sum dz.

    Returns:
        dx in the dtype of `x`; dgamma and dbeta [C] in the compute dtype.
    """
    gamma, dz = _channels(weight, x), dy.to(compute_dtype(x))
    xh, rstd = _normalized(x, eps, norm)
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
    """[C] -> [1, C, 1, ...], in the compute dtype."""
    return vector.to(compute_dtype(x)).view((1, -1) + (1,) * (x.ndim - 2))


def _normalized(x: Tensor, eps: float, norm: str) -> tuple[Tensor, Tensor]:
    """x / std over channels, centered for "layer", and 1 / std."""
    x = x.to(compute_dtype(x))
    if norm == "layer":
        x = x - x.mean(dim=1, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps)
    return x * rstd, rstd

"""GroupNorm and activation in one call, with the additions that come just before them."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_channel_vector, check_choice, check_floating, check_like
from .dispatch import Backend, resolve_backend
from .group_norm import group_norm
from .norm_act_ops import norm_act_forward

__all__ = ["Act", "norm_act"]

Act = Literal["silu", "identity"]


@overload
def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = ...,
    act: Act = ...,
    pre_bias: Tensor | None = ...,
    residual: None = ...,
    backend: Backend = ...,
) -> Tensor: ...
@overload
def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = ...,
    act: Act = ...,
    pre_bias: Tensor | None = ...,
    *,
    residual: Tensor,
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...
def norm_act(
    x: Tensor,  # [N, C, *spatial]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    groups: int,
    eps: float = 1e-6,
    act: Act = "silu",
    pre_bias: Tensor | None = None,  # [C]
    residual: Tensor | None = None,  # like x
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalize `x + pre_bias + residual` over each group of channels, scale, shift and activate.

    Args:
        x: activations, channels last (the fast order) or first.
        weight, bias: the affine part, one value a channel; in the dtype of `x`, or fp32 beside a half-precision `x`.
        groups: number of groups; must divide C.
        eps: added to the variance.
        act: "silu" (z * sigmoid(z)) or "identity".
        pre_bias: added to `x` first, one value a channel: the bias of the convolution before.
        residual: added to `x` first; the sum, rounded to the dtype of `x`, is what is normalized, and is returned too.
        backend: "triton" (the fused kernels), "torch" (native operators), or "auto": the kernels on an NVIDIA GPU, else torch.

    Returns:
        y like `x`, or (y, sum) with a residual. Twice differentiable in every tensor.

    Raises:
        BackendError: "triton" was asked for and can't run on `x`.
        ValueError: an argument of the wrong kind, shape, device or dtype; the message names it.

    Source: Wu & He 2018, "Group Normalization"; Elfwing et al. 2017 (SiLU).
    """
    check_norm_act(x, weight, bias, groups, act, pre_bias, residual)
    if resolve_backend("norm_act", backend, x) == "triton":
        y, total, _, _ = norm_act_forward(x, residual, weight, bias, pre_bias, groups, eps, act)
        return y if residual is None else (y, total)
    total = x
    if pre_bias is not None:
        total = total + pre_bias.to(x.dtype).view((1, -1) + (1,) * (x.ndim - 2))
    if residual is not None:
        total = total + residual
    y = _native(total, weight, bias, groups, eps, act)
    return y if residual is None else (y, total)


def check_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    act: str,
    pre_bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Raise a ValueError that names the argument `norm_act` can't take."""
    op = "norm_act"
    check_floating(op, "x", x)
    check_choice(op, "act", act, ("silu", "identity"))
    for name, vector in (("weight", weight), ("bias", bias), ("pre_bias", pre_bias)):
        check_channel_vector(op, name, vector, x)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(
            f"{op}: groups is {groups}, which does not divide the {x.shape[1]} channels of x; give a divisor"
        )
    check_like(op, "residual", residual, x)


def _native(total: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, act: Act) -> Tensor:
    if (
        weight.dtype != total.dtype and not total.is_cpu
    ):  # only the CPU operator takes fp32 parameters beside half x
        z = F.group_norm(total.float(), groups, weight, bias, eps)
        return (F.silu(z) if act == "silu" else z).to(total.dtype)
    z = group_norm(total, groups, weight, bias, eps)
    if act == "identity":
        return z
    # nobody else holds z, and without a graph nobody will: fresh memory costs the CPU as much as the activation
    graph = torch.is_grad_enabled() and z.requires_grad
    return F.silu(z, inplace=not (graph or torch.compiler.is_exporting()))

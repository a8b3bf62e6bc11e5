"""GroupNorm and activation in one call, with the additions that come just before them."""

from __future__ import annotations

from typing import Literal, overload

import torch.nn.functional as F
from torch import Tensor

__all__ = ["BackendError", "norm_act"]

Act = Literal["silu", "identity"]
Backend = Literal["auto", "triton", "torch"]


class BackendError(RuntimeError):
    """The backend that was asked for by name can't run here."""


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
        x: activations, any memory format.
        weight, bias: the affine part, one value a channel.
        groups: number of groups; must divide C.
        eps: added to the variance.
        act: "silu" (z * sigmoid(z)) or "identity".
        pre_bias: added to `x` first, one value a channel: the bias of the convolution before.
        residual: added to `x` first; the sum is then returned too.
        backend: "torch" (native operators), "triton", or "auto" (the fastest that runs here; so far that is "torch").

    Returns:
        y like `x`, or (y, sum) with a residual.

    Raises:
        BackendError: "triton" was asked for and this version has no Triton kernel for the op.
        ValueError: an unknown activation or backend.

    Source: Wu & He 2018, "Group Normalization"; Elfwing et al. 2017 (SiLU).
    """
    if act not in ("silu", "identity"):
        raise ValueError(f"norm_act: unknown act {act!r}; use 'silu' or 'identity'")
    if backend == "triton":
        raise BackendError("norm_act: this version has no Triton kernel for it; use backend='auto' or 'torch'")
    if backend not in ("auto", "torch"):
        raise ValueError(f"norm_act: unknown backend {backend!r}; use 'auto', 'triton' or 'torch'")
    total = x
    if pre_bias is not None:
        total = total + pre_bias.to(x.dtype).view((1, -1) + (1,) * (x.ndim - 2))
    if residual is not None:
        total = total + residual
    z = F.group_norm(total, groups, weight, bias, eps)
    y = F.silu(z) if act == "silu" else z
    return y if residual is None else (y, total)

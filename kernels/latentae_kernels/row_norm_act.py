"""RMSNorm or LayerNorm over the channels of each pixel, and activation, in one call."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from .checks import check_channel_vector, check_choice, check_floating
from .dispatch import Backend, BackendError, resolve_backend
from .layout import dense, like
from .row_norm_act_ops import row_norm_act_forward

__all__ = ["MAX_CHANNELS", "row_norm_act"]

MAX_CHANNELS = 4096
"""Widest row the kernels take: a program holds all channels of a pixel in registers."""


def row_norm_act(
    x: Tensor,  # [N, C, *spatial]
    weight: Tensor,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-6,
    norm: Literal["rms", "layer"] = "rms",
    act: Literal["silu", "identity"] = "silu",
    backend: Backend = "auto",
) -> Tensor:
    """Normalize each pixel over its channels, scale, shift and activate.

        xh = x / sqrt(mean_c x^2 + eps)             norm="rms"
        xh = (x - mean_c x) / sqrt(var_c x + eps)   norm="layer"
        y = act(weight * xh + bias)

    Args:
        x: activations, channels last (the fast order) or first.
        weight, bias: the affine part, one value a channel; in the dtype of `x`, or fp32 beside a half-precision `x`.
        eps: added to the mean square; above zero, so that a pixel of zeros has a value and a gradient.
        norm: "rms" (no mean is subtracted) or "layer".
        act: "silu" (z * sigmoid(z)) or "identity".
        backend: "triton" (the fused kernels, up to 4096 channels), "torch" (native operators), or "auto": the kernels on an NVIDIA
            GPU, else torch.

    Returns:
        y like `x`, in its dtype and memory order. Twice differentiable in every tensor.

    Raises:
        BackendError: "triton" was asked for and can't run on `x`.
        ValueError: an argument of the wrong kind, shape, device or dtype; the message names it.

    Source: Zhang & Sennrich 2019 (RMSNorm, eq. 4); Ba, Kiros & Hinton 2016 (LayerNorm, eq. 4); Elfwing et al. 2017 (SiLU).
    """
    op = "row_norm_act"
    check_floating(op, "x", x)
    check_choice(op, "norm", norm, ("rms", "layer"))
    check_choice(op, "act", act, ("silu", "identity"))
    check_channel_vector(op, "weight", weight, x)
    check_channel_vector(op, "bias", bias, x)
    if not eps > 0:
        raise ValueError(f"{op}: eps is {eps}, expected a number above zero")
    if resolve_backend(op, backend, x) == "triton":
        if x.shape[1] <= MAX_CHANNELS:
            return row_norm_act_forward(dense(x), weight, bias, eps, norm, act)
        if backend == "triton":
            raise BackendError(
                f"{op}: x has {x.shape[1]} channels, the kernels take up to {MAX_CHANNELS}; use backend='auto' or 'torch'"
            )
    return _native(x, weight, bias, eps, norm, act)


def _native(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: str, act: str) -> Tensor:
    rows, width = (
        x.movedim(1, -1).to(weight.dtype),
        (x.shape[1],),
    )  # fp32 parameters: maths in fp32, as under autocast
    if norm == "layer":
        z = F.layer_norm(rows, width, weight, bias, eps)
    else:
        z = F.rms_norm(rows, width, weight, eps)
        z = z if bias is None else z + bias
    y = F.silu(z) if act == "silu" else z
    return like(y.to(x.dtype).movedim(-1, 1), x)

"""RMSNorm or LayerNorm over the channels of each pixel, and an activation, in one step."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import differentiate_backward
from ..dispatch import Backend, BackendError, resolve_backend
from ..tensors import check_channel_vector, check_choice, check_floating, compute_dtype, dense, like

__all__ = ["MAX_CHANNELS", "row_norm_act"]

MAX_CHANNELS = 4096
"""Maximum number of channels of the kernels: a program keeps a pixel's channels in registers."""


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
        x: activations, channels_last (fast) or contiguous.
        weight, bias: one value per channel, in the dtype of `x`, or in fp32 for a half-precision
            `x`.
        eps: added to the mean square; above zero, so that a pixel of zeros has a gradient.
        norm: "rms" (no mean is subtracted) or "layer".
        act: "silu" (z * sigmoid(z)) or "identity".
        backend: "triton" (kernels, at most 4096 channels), "torch" (native operators), or "auto":
            the kernels on an NVIDIA GPU, else torch.

    Returns:
        y in the shape, dtype and memory format of `x`. Twice differentiable in every tensor.

    Raises:
        BackendError: "triton" was requested and cannot run on `x`.
        ValueError: an invalid shape, device, dtype or choice; the message names the argument.

    Source: Zhang & Sennrich 2019 (RMSNorm, eq. 4); Ba, Kiros & Hinton 2016 (LayerNorm, eq. 4);
    Elfwing et al. 2017 (SiLU).
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
            return _forward(dense(x), weight, bias, eps, norm, act)
        if backend == "triton":
            raise BackendError(
                f"{op}: x has {x.shape[1]} channels, the kernels take at most {MAX_CHANNELS}; "
                "use backend='auto' or 'torch'"
            )
    return _native(x, weight, bias, eps, norm, act)


def _native(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: str, act: str) -> Tensor:
    rows = x.movedim(1, -1).to(weight.dtype)  # fp32 parameters: arithmetic in fp32, as under autocast
    if norm == "layer":
        z = F.layer_norm(rows, weight.shape, weight, bias, eps)
    else:
        z = F.rms_norm(rows, weight.shape, weight, eps)
        z = z if bias is None else z + bias
    y = F.silu(z) if act == "silu" else z
    return like(y.to(x.dtype).movedim(-1, 1), x)


@torch.library.custom_op("latentae_kernels::row_norm_act_forward", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: str, act: str) -> Tensor:
    """y like x."""
    from .kernels import launch_forward

    return launch_forward(dense(x), weight, bias, eps, norm, act)


@_forward.register_fake
def _(x, weight, bias, eps, norm, act):
    return torch.empty_like(dense(x))


@torch.library.custom_op("latentae_kernels::row_norm_act_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm: str,
    act: str,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x; dweight and dbias [C] in the compute dtype, empty where not computed."""
    from .kernels import launch_backward

    x = dense(x)
    return launch_backward(like(dy, x), x, weight, bias, eps, norm, act, parameters)


@_backward.register_fake
def _(dy, x, weight, bias, eps, norm, act, parameters):
    widths = x.shape[1] * parameters, x.shape[1] * (parameters and bias is not None)
    return torch.empty_like(dense(x)), *(x.new_empty(width, dtype=compute_dtype(x)) for width in widths)


def _closed_form(dy, x, weight, bias, eps, norm, act, parameters) -> tuple[Tensor | None, ...]:
    """Closed form of row_norm_act's gradient; it recomputes the statistics, so its derivative is
    the second derivative.

    With xh the normalized row, z = gamma xh + beta, dz = dy act'(z) and means over channels:
    dx = (gamma dz - mean(gamma dz) - xh mean(gamma dz xh)) / std, without the first mean for "rms";
    dgamma = sum dz xh, dbeta = sum dz.

    Returns:
        dx in the dtype of `x`; dgamma and dbeta [C] in the compute dtype, None where not computed.
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
    dweight = (dz * xh).sum(others) if parameters else None
    return (dx * rstd).to(x.dtype), dweight, dz.sum(others) if parameters and bias is not None else None


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


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradient(ctx: Any, dy: Tensor) -> tuple:
    x, weight, bias = ctx.saved_tensors
    _, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dx, dweight, dbias = _backward(dy, x, weight, bias, *ctx.options, needs_weight or needs_bias)
    dweight = dweight.to(weight.dtype) if needs_weight else None
    return dx, dweight, dbias.to(bias.dtype) if needs_bias else None, None, None, None


_forward.register_autograd(_gradient, setup_context=_save)
differentiate_backward(_backward, _closed_form, tensors=4)

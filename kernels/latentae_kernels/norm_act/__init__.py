"""GroupNorm and an activation in one step, with the bias and residual added before."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import differentiate_backward
from ..dispatch import Backend, resolve_backend
from ..tensors import (
    check_channel_vector,
    check_choice,
    check_floating,
    check_like,
    compute_dtype,
    dense,
    like,
)
from .group_norm import group_norm, norm_act_gradients

__all__ = ["Act", "Norm", "check_norm_act", "norm_act"]

Act = Literal["silu", "identity"]


class Norm(NamedTuple):
    """GroupNorm and activation before a convolution: the arguments of `norm_act`."""

    weight: Tensor  # [C]
    bias: Tensor  # [C]
    groups: int
    eps: float = 1e-6
    act: Act = "silu"


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
        x: activations, channels_last (fast) or contiguous.
        weight, bias: one value per channel, in the dtype of `x`, or in fp32 for a half-precision
            `x`.
        groups: number of groups; must divide C.
        eps: added to the variance.
        act: "silu" (z * sigmoid(z)) or "identity".
        pre_bias: added to `x` first, one value per channel: the bias of the convolution before.
        residual: added to `x` first. The sum, rounded to the dtype of `x`, is normalized and also
            returned.
        backend: "triton" (kernels), "torch" (native operators), or "auto": the kernels on an NVIDIA
            GPU, else torch.

    Returns:
        y like `x`, or (y, sum) with a residual. Twice differentiable in every tensor.

    Raises:
        BackendError: "triton" was requested and cannot run on `x`.
        ValueError: an invalid shape, device, dtype or choice; the message names the argument.

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
    pre_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Raise a ValueError that names an invalid argument of `norm_act`."""
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
    # only the CPU operator mixes half x and fp32 weights
    if weight.dtype != total.dtype and not total.is_cpu:
        z = F.group_norm(total.float(), groups, weight, bias, eps)
        return (F.silu(z) if act == "silu" else z).to(total.dtype)
    z = group_norm(total, groups, weight, bias, eps)
    if act == "identity":
        return z
    # z is used nowhere else, and fresh memory costs a CPU as much as the activation
    graph = torch.is_grad_enabled() and z.requires_grad
    return F.silu(z, inplace=not (graph or torch.compiler.is_exporting()))


@torch.library.custom_op("latentae_kernels::norm_act_forward", mutates_args=())
def norm_act_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    pre_bias: Tensor | None,
    groups: int,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the sum that was normalized (empty without a residual), mean and 1/std [N, groups]."""
    from .launch import launch_forward

    x = dense(x)
    residual = None if residual is None else like(residual, x)
    return launch_forward(x, residual, weight, bias, pre_bias, groups, eps, act)


@norm_act_forward.register_fake
def _(x, residual, weight, bias, pre_bias, groups, eps, act):
    x = dense(x)
    statistics = x.new_empty((x.shape[0], groups), dtype=compute_dtype(x))
    total = torch.empty_like(x) if residual is not None else x.new_empty(0)
    return torch.empty_like(x), total, statistics, torch.empty_like(statistics)


@torch.library.custom_op("latentae_kernels::norm_act_apply", mutates_args=())
def norm_act_apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pre_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    act: str,
) -> Tensor:
    """y from x and the statistics of an earlier pass; it has no gradient."""
    from .launch import launch_apply

    return launch_apply(dense(x), weight, bias, pre_bias, mean, rstd, groups, act)


@norm_act_apply.register_fake
def _(x, weight, bias, pre_bias, mean, rstd, groups, act):
    return torch.empty_like(dense(x))


@torch.library.custom_op("latentae_kernels::norm_act_backward", mutates_args=())
def norm_act_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pre_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    eps: float,
    act: str,
    sum_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and the sum of dx per channel (zeros unless `sum_dx`)."""
    from .launch import launch_backward

    x = dense(x)
    dtotal = None if dtotal is None else like(dtotal, x)
    return launch_backward(like(dy, x), dtotal, x, weight, bias, pre_bias, mean, rstd, groups, act, sum_dx)


@norm_act_backward.register_fake
def _(dy, dtotal, x, weight, bias, pre_bias, mean, rstd, groups, eps, act, sum_dx):
    x = dense(x)
    return torch.empty_like(x), *(x.new_empty(x.shape[1], dtype=compute_dtype(x)) for _ in range(3))


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, weight, bias, pre_bias, ctx.groups, ctx.eps, ctx.act = inputs
    _, total, mean, rstd = output
    ctx.set_materialize_grads(False)  # zeros for an unused sum would be another pass over memory
    ctx.mark_non_differentiable(mean, rstd)
    ctx.residual = residual is not None
    ctx.pre_bias_dtype = None if pre_bias is None else pre_bias.dtype
    if ctx.residual:  # the sum already contains pre_bias
        x, pre_bias = total, None
    ctx.save_for_backward(x, weight, bias, pre_bias, mean, rstd)


def _gradient(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Any) -> tuple:
    x, weight, bias, pre_bias, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dtotal = dtotal if ctx.residual else None
    sum_dx = ctx.needs_input_grad[4]
    dx, dweight, dbias, dpre_bias = norm_act_backward(
        dy, dtotal, x, weight, bias, pre_bias, mean, rstd, ctx.groups, ctx.eps, ctx.act, sum_dx
    )
    dresidual = dx if ctx.residual else None
    dpre_bias = dpre_bias.to(ctx.pre_bias_dtype) if sum_dx else None
    return dx, dresidual, dweight.to(weight.dtype), dbias.to(bias.dtype), dpre_bias, None, None, None


norm_act_forward.register_autograd(_gradient, setup_context=_save)
# the last input is sum_dx
differentiate_backward(norm_act_backward, lambda *inputs: norm_act_gradients(*inputs[:-1]), tensors=6)

"""`norm_act` as torch operators: forward, recomputation of y, and backward, each with shapes for the compiler and a gradient.

The backward operator has a gradient of its own: it replays the closed form in plain torch, statistics recomputed from x, so that
second derivatives (R1, Jacobian penalties) are those of the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layout import dense, like
from .reference import norm_act_gradients
from .replay import replay

__all__ = ["norm_act_apply", "norm_act_backward", "norm_act_forward"]


def _acc(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


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
    from .norm_act_launch import launch_forward

    x = dense(x)
    residual = None if residual is None else like(residual, x)
    return launch_forward(x, residual, weight, bias, pre_bias, groups, eps, act)


@norm_act_forward.register_fake
def _(x, residual, weight, bias, pre_bias, groups, eps, act):
    x = dense(x)
    statistics = x.new_empty((x.shape[0], groups), dtype=_acc(x))
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
    from .norm_act_launch import launch_apply

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
    from .norm_act_launch import launch_backward

    x = dense(x)
    dtotal = None if dtotal is None else like(dtotal, x)
    return launch_backward(like(dy, x), dtotal, x, weight, bias, pre_bias, mean, rstd, groups, act, sum_dx)


@norm_act_backward.register_fake
def _(dy, dtotal, x, weight, bias, pre_bias, mean, rstd, groups, eps, act, sum_dx):
    x = dense(x)
    return torch.empty_like(x), *(x.new_empty(x.shape[1], dtype=_acc(x)) for _ in range(3))


def _remember_forward(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, weight, bias, pre_bias, ctx.groups, ctx.eps, ctx.act = inputs
    _, total, mean, rstd = output
    ctx.set_materialize_grads(False)  # zeros for an unused sum would be another pass over memory
    ctx.mark_non_differentiable(mean, rstd)
    ctx.residual = residual is not None
    ctx.pre_bias_dtype = None if pre_bias is None else pre_bias.dtype
    # the sum already holds pre_bias
    ctx.save_for_backward(
        total if ctx.residual else x, weight, bias, None if ctx.residual else pre_bias, mean, rstd
    )


def _forward_gradient(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Any) -> tuple:
    x, weight, bias, pre_bias, mean, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    needs_pre_bias = ctx.needs_input_grad[4]
    dx, dweight, dbias, dpre_bias = norm_act_backward(
        dy,
        dtotal if ctx.residual else None,
        x,
        weight,
        bias,
        pre_bias,
        mean,
        rstd,
        ctx.groups,
        ctx.eps,
        ctx.act,
        needs_pre_bias,
    )
    dpre_bias = dpre_bias.to(ctx.pre_bias_dtype) if needs_pre_bias else None
    return (
        dx,
        dx if ctx.residual else None,
        dweight.to(weight.dtype),
        dbias.to(bias.dtype),
        dpre_bias,
        None,
        None,
        None,
    )


def _remember_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    dy, dtotal, x, weight, bias, pre_bias, _, _, ctx.groups, ctx.eps, ctx.act, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dy, dtotal, x, weight, bias, pre_bias)


def _backward_gradient(ctx: Any, *gradients: Tensor | None) -> tuple:
    def closed_form(dy, dtotal, x, weight, bias, pre_bias):
        return norm_act_gradients(dy, dtotal, x, weight, bias, pre_bias, ctx.groups, ctx.eps, ctx.act)

    by_input = replay(closed_form, ctx.saved_tensors, ctx.needs_input_grad, gradients)
    return *by_input, None, None, None, None, None, None


norm_act_forward.register_autograd(_forward_gradient, setup_context=_remember_forward)
norm_act_backward.register_autograd(_backward_gradient, setup_context=_remember_backward)

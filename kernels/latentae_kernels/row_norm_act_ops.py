"""`row_norm_act` as torch operators: forward and backward, each with shapes for the compiler and a gradient.

Statistics and activation are recomputed from x, which sits in registers anyway: nothing but the inputs is kept. The backward
operator's own gradient replays the closed form in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layout import dense, like
from .reference import row_norm_act_gradients
from .replay import replay

__all__ = ["row_norm_act_backward", "row_norm_act_forward"]


@torch.library.custom_op("latentae_kernels::row_norm_act_forward", mutates_args=())
def row_norm_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: str, act: str
) -> Tensor:
    """y like x."""
    from .row_norm_act_kernels import launch_forward

    return launch_forward(dense(x), weight, bias, eps, norm, act)


@row_norm_act_forward.register_fake
def _(x, weight, bias, eps, norm, act):
    return torch.empty_like(dense(x))


@torch.library.custom_op("latentae_kernels::row_norm_act_backward", mutates_args=())
def row_norm_act_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm: str,
    act: str,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x; dweight and dbias [C] in the precision of the maths, empty unless `parameters` (and there is a bias)."""
    from .row_norm_act_kernels import launch_backward

    x = dense(x)
    return launch_backward(like(dy, x), x, weight, bias, eps, norm, act, parameters)


@row_norm_act_backward.register_fake
def _(dy, x, weight, bias, eps, norm, act, parameters):
    x = dense(x)
    width = x.shape[1] if parameters else 0
    acc = torch.promote_types(x.dtype, torch.float32)
    return (
        torch.empty_like(x),
        x.new_empty(width, dtype=acc),
        x.new_empty(width if bias is not None else 0, dtype=acc),
    )


def _remember_forward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias)


def _forward_gradient(ctx: Any, dy: Tensor) -> tuple:
    x, weight, bias = ctx.saved_tensors
    _, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dx, dweight, dbias = row_norm_act_backward(dy, x, weight, bias, *ctx.options, needs_weight or needs_bias)
    dweight = dweight.to(weight.dtype) if needs_weight else None
    return dx, dweight, dbias.to(bias.dtype) if needs_bias else None, None, None, None


def _remember_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    dy, x, weight, bias, *ctx.options, ctx.parameters = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dy, x, weight, bias)


def _backward_gradient(ctx: Any, *gradients: Tensor | None) -> tuple:
    def closed_form(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias = row_norm_act_gradients(dy, x, weight, bias, *ctx.options)
        return dx, dweight if ctx.parameters else None, dbias if ctx.parameters and bias is not None else None

    return *replay(closed_form, ctx.saved_tensors, ctx.needs_input_grad, gradients), None, None, None, None


row_norm_act_forward.register_autograd(_forward_gradient, setup_context=_remember_forward)
row_norm_act_backward.register_autograd(_backward_gradient, setup_context=_remember_backward)

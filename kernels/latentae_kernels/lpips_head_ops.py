"""`lpips_head` as torch operators: forward and backward, each with shapes for the compiler and a gradient to both maps.

The backward operator's own gradient replays the closed form in plain torch. The channel weights get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layout import dense, like
from .reference import lpips_head_gradients
from .replay import replay

__all__ = ["lpips_head_backward", "lpips_head_forward"]


@torch.library.custom_op("latentae_kernels::lpips_head_forward", mutates_args=())
def lpips_head_forward(a: Tensor, b: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Distance of each sample [N], in the precision of the maths."""
    from .lpips_head_kernels import launch_forward

    a = dense(a)
    return launch_forward(a, like(b, a), weight, eps)


@lpips_head_forward.register_fake
def _(a, b, weight, eps):
    return a.new_empty(a.shape[0], dtype=torch.promote_types(a.dtype, torch.float32))


@torch.library.custom_op("latentae_kernels::lpips_head_backward", mutates_args=())
def lpips_head_backward(
    gradient: Tensor, a: Tensor, b: Tensor, weight: Tensor, eps: float, needs_a: bool, needs_b: bool
) -> tuple[Tensor, Tensor]:
    """da and db in the memory order of a, empty where not needed."""
    from .lpips_head_kernels import launch_backward

    a = dense(a)
    return launch_backward(gradient, a, like(b, a), weight, eps, needs_a, needs_b)


@lpips_head_backward.register_fake
def _(gradient, a, b, weight, eps, needs_a, needs_b):
    a = dense(a)
    return tuple(torch.empty_like(a) if needed else a.new_empty(0) for needed in (needs_a, needs_b))


def _remember_forward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    a, b, weight, ctx.eps = inputs
    ctx.save_for_backward(a, b, weight)


def _forward_gradient(ctx: Any, gradient: Tensor) -> tuple:
    needs_a, needs_b = ctx.needs_input_grad[:2]
    da, db = lpips_head_backward(gradient, *ctx.saved_tensors, ctx.eps, needs_a, needs_b)
    return da if needs_a else None, db if needs_b else None, None, None


def _remember_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    gradient, a, b, weight, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, a, b, weight)


def _backward_gradient(ctx: Any, *gradients: Tensor | None) -> tuple:
    def closed_form(*inputs: Any) -> tuple[Tensor | None, ...]:
        return lpips_head_gradients(*inputs, *ctx.options)

    return *replay(closed_form, ctx.saved_tensors, ctx.needs_input_grad, gradients), None, None, None


lpips_head_forward.register_autograd(_forward_gradient, setup_context=_remember_forward)
lpips_head_backward.register_autograd(_backward_gradient, setup_context=_remember_backward)

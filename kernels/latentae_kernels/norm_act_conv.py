"""norm_act and the convolution that reads it as one step of the graph, which does not keep the activation in between."""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Backend, resolve_backend
from .norm_act import Act, check_norm_act, norm_act
from .norm_act_ops import norm_act_apply, norm_act_backward, norm_act_forward

__all__ = ["norm_act_conv2d"]


@overload
def norm_act_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    conv_weight: Tensor,
    conv_bias: Tensor | None = ...,
    padding: int = ...,
    eps: float = ...,
    act: Act = ...,
    pre_bias: Tensor | None = ...,
    residual: None = ...,
    backend: Backend = ...,
) -> Tensor: ...
@overload
def norm_act_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    conv_weight: Tensor,
    conv_bias: Tensor | None = ...,
    padding: int = ...,
    eps: float = ...,
    act: Act = ...,
    pre_bias: Tensor | None = ...,
    *,
    residual: Tensor,
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...
def norm_act_conv2d(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    groups: int,
    conv_weight: Tensor,  # [C_out, C, k, k]
    conv_bias: Tensor | None = None,  # [C_out]
    padding: int = 0,
    eps: float = 1e-6,
    act: Act = "silu",
    pre_bias: Tensor | None = None,  # [C]
    residual: Tensor | None = None,  # like x
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`conv2d(norm_act(x, ...), conv_weight, conv_bias, padding=padding)`, remembering x and its statistics only.

    An ordinary graph keeps x for the normalization and its result for the convolution. Here the result is computed again (one
    read, one write) when the convolution's backward pass needs it, which halves what a residual block keeps. With the "torch"
    backend the two steps are plain operators.

    Returns:
        The convolution's output, or (output, sum) with a residual; the sum as `norm_act` returns it. Twice differentiable.

    Raises:
        BackendError, ValueError: as `norm_act`.
    """
    fused = resolve_backend("norm_act", backend, x) == "triton"
    if fused and torch.is_grad_enabled():
        check_norm_act(x, weight, bias, groups, act, pre_bias, residual)
        out, total = _NormActConv.apply(
            x,
            residual,
            weight,
            bias,
            pre_bias,
            conv_weight,
            conv_bias,
            groups,
            eps,
            act,
            padding,
            _convolution_dtype(x),
        )[:2]
        return out if residual is None else (out, total)
    if residual is None:
        y = norm_act(x, weight, bias, groups, eps, act, pre_bias, backend=backend)
        return F.conv2d(y, conv_weight, conv_bias, padding=padding)
    y, total = norm_act(x, weight, bias, groups, eps, act, pre_bias, residual=residual, backend=backend)
    return F.conv2d(y, conv_weight, conv_bias, padding=padding), total


def _convolution_dtype(x: Tensor) -> torch.dtype:
    """What autocast would make of a convolution's inputs here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _NormActConv(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        pre_bias: Tensor | None,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        groups: int,
        eps: float,
        act: str,
        padding: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, total, mean, rstd = norm_act_forward(x, residual, weight, bias, pre_bias, groups, eps, act)
        shift = None if conv_bias is None else conv_bias.to(dtype)
        return F.conv2d(y.to(dtype), conv_weight.to(dtype), shift, padding=padding), total, mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        (
            x,
            residual,
            weight,
            bias,
            pre_bias,
            conv_weight,
            conv_bias,
            ctx.groups,
            ctx.eps,
            ctx.act,
            ctx.padding,
            ctx.dtype,
        ) = inputs
        _, total, mean, rstd = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.residual = residual is not None
        ctx.conv_bias = conv_bias
        ctx.pre_bias_dtype = None if pre_bias is None else pre_bias.dtype
        saved = total if ctx.residual else x  # the sum already holds pre_bias
        ctx.save_for_backward(
            saved, weight, bias, None if ctx.residual else pre_bias, conv_weight, conv_bias, mean, rstd
        )

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None, *_: Any) -> tuple:
        dtotal = (
            dtotal if ctx.residual else None
        )  # a compiler hands an empty gradient to the sum that is not there
        if dout is None:
            return _sum_gradient(ctx, dtotal)
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, dout, dtotal)
        x, weight, bias, pre_bias, conv_weight, conv_bias, mean, rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad
        y = norm_act_apply(x, weight, bias, pre_bias, mean, rstd, ctx.groups, ctx.act).to(ctx.dtype)
        dy, dconv, dconv_bias = torch.ops.aten.convolution_backward(
            dout, y, conv_weight.to(ctx.dtype), None if conv_bias is None else list(conv_bias.shape), [1, 1],
            [ctx.padding] * 2, [1, 1], False, [0, 0], 1, [True, needed[5], conv_bias is not None and needed[6]],
        )  # fmt: skip
        del y
        dx, dweight, dbias, dpre_bias = norm_act_backward(
            dy.to(x.dtype),
            dtotal,
            x,
            weight,
            bias,
            pre_bias,
            mean,
            rstd,
            ctx.groups,
            ctx.eps,
            ctx.act,
            needed[4],
        )
        return (
            dx,
            dx if ctx.residual else None,
            dweight.to(weight.dtype),
            dbias.to(bias.dtype),
            dpre_bias.to(ctx.pre_bias_dtype) if needed[4] else None,
            None if dconv is None else dconv.to(conv_weight.dtype),
            None if dconv_bias is None or conv_bias is None else dconv_bias.to(conv_bias.dtype),
            *(None,) * 5,
        )


def _sum_gradient(ctx: Any, dtotal: Tensor | None) -> tuple:
    """Where only the sum was used, its gradient is that of everything added to it."""
    needs_pre_bias = dtotal is not None and ctx.needs_input_grad[4]
    dpre_bias = (
        dtotal.sum((0, 2, 3)).to(ctx.pre_bias_dtype) if dtotal is not None and needs_pre_bias else None
    )
    return dtotal, dtotal, None, None, dpre_bias, *(None,) * 7


def _differentiable_backward(ctx: Any, dout: Tensor, dtotal: Tensor | None) -> tuple:
    """The same gradient as a graph: the two steps are run again as operators that can be differentiated once more."""
    saved = ctx.saved_tensors[:6]
    inputs: list[Any] = [
        t.view_as(t) if t is not None and t.requires_grad else t for t in saved
    ]  # stops at each input
    x, weight, bias, pre_bias, conv_weight, conv_bias = inputs
    y = norm_act(x, weight, bias, ctx.groups, ctx.eps, ctx.act, pre_bias, backend="triton").to(ctx.dtype)
    shift = None if conv_bias is None else conv_bias.to(ctx.dtype)
    out = F.conv2d(y, conv_weight.to(ctx.dtype), shift, padding=ctx.padding)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, dout, create_graph=True, allow_unused=True))
    dx, dweight, dbias, dpre_bias, dconv, dconv_bias = (
        next(found) if t is not None and t.requires_grad else None for t in inputs
    )
    if ctx.residual:
        dx = dtotal if dx is None else dx if dtotal is None else dx + dtotal
        dpre_bias = (
            None if dx is None or not ctx.needs_input_grad[4] else dx.sum((0, 2, 3)).to(ctx.pre_bias_dtype)
        )
    return dx, dx if ctx.residual else None, dweight, dbias, dpre_bias, dconv, dconv_bias, *(None,) * 5

"""`norm_act` and a convolution as one autograd step without a saved activation."""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Backend, resolve_backend
from . import Norm, check_norm_act, norm_act, norm_act_apply, norm_act_backward, norm_act_forward

__all__ = ["norm_act_conv2d"]


@overload
def norm_act_conv2d(
    x: Tensor,
    norm: Norm,
    conv_weight: Tensor,
    conv_bias: Tensor | None = ...,
    padding: int = ...,
    pre_bias: Tensor | None = ...,
    residual: None = ...,
    backend: Backend = ...,
) -> Tensor: ...
@overload
def norm_act_conv2d(
    x: Tensor,
    norm: Norm,
    conv_weight: Tensor,
    conv_bias: Tensor | None = ...,
    padding: int = ...,
    pre_bias: Tensor | None = ...,
    *,
    residual: Tensor,
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...
def norm_act_conv2d(
    x: Tensor,  # [N, C, H, W]
    norm: Norm,
    conv_weight: Tensor,  # [C_out, C, k, k]
    conv_bias: Tensor | None = None,  # [C_out]
    padding: int = 0,
    pre_bias: Tensor | None = None,  # [C]
    residual: Tensor | None = None,  # like x
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`conv2d(norm_act(x, *norm, ...), conv_weight, conv_bias, padding=padding)`; the graph keeps x
    and its statistics only.

    An ordinary graph keeps x for the normalization and its result for the convolution. Here the
    convolution's backward pass recomputes the result (one read, one write), which halves what a
    residual block keeps. With the "torch" backend the two steps are plain operators.

    Returns:
        The convolution's output, or (output, sum) with a residual; the sum as in `norm_act`. Twice
        differentiable.

    Raises:
        BackendError, ValueError: as in `norm_act`.
    """
    fused = resolve_backend("norm_act", backend, x) == "triton"
    if fused and torch.is_grad_enabled():
        check_norm_act(x, norm.weight, norm.bias, norm.groups, norm.act, pre_bias, residual)
        tensors = (x, residual, norm.weight, norm.bias, pre_bias, conv_weight, conv_bias)
        options = (norm.groups, norm.eps, norm.act, padding, _convolution_dtype(x))
        out, total = _NormActConv.apply(*tensors, *options)[:2]
        return out if residual is None else (out, total)
    if residual is None:
        y = norm_act(x, *norm, pre_bias=pre_bias, backend=backend)
        return F.conv2d(y, conv_weight, conv_bias, padding=padding)
    y, total = norm_act(x, *norm, pre_bias=pre_bias, residual=residual, backend=backend)
    return F.conv2d(y, conv_weight, conv_bias, padding=padding), total


def _convolution_dtype(x: Tensor) -> torch.dtype:
    """The dtype to which autocast would convert a convolution's inputs here."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


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
        return _convolve(y, conv_weight, conv_bias, padding, dtype), total, mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, residual, weight, bias, pre_bias, conv_weight, conv_bias, *options = inputs
        ctx.groups, ctx.eps, ctx.act, ctx.padding, ctx.dtype = options
        _, total, mean, rstd = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.residual = residual is not None
        ctx.pre_bias_dtype = None if pre_bias is None else pre_bias.dtype
        if ctx.residual:  # the sum already contains pre_bias
            x, pre_bias = total, None
        ctx.save_for_backward(x, weight, bias, pre_bias, conv_weight, conv_bias, mean, rstd)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None, *_: Any) -> tuple:
        dtotal = dtotal if ctx.residual else None  # a compiler passes an empty gradient for the missing sum
        if dout is None:
            gradients = (dtotal, None, None, _pre_bias_gradient(ctx, dtotal), None, None)
        elif torch.is_grad_enabled():
            gradients = _differentiable_gradients(ctx, dout, dtotal)
        else:
            gradients = _gradients(ctx, dout, dtotal)
        dx, *rest = gradients
        return dx, dx if ctx.residual else None, *rest, *(None,) * 5


def _convolve(y: Tensor, weight: Tensor, bias: Tensor | None, padding: int, dtype: torch.dtype) -> Tensor:
    bias = None if bias is None else bias.to(dtype)
    return F.conv2d(y.to(dtype), weight.to(dtype), bias, padding=padding)


def _gradients(ctx: Any, dout: Tensor, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias, pre_bias, conv_weight and conv_bias."""
    x, weight, bias, pre_bias, conv_weight, conv_bias, mean, rstd = ctx.saved_tensors
    needs_pre_bias, needs_conv, needs_conv_bias = ctx.needs_input_grad[4:7]
    y = norm_act_apply(x, weight, bias, pre_bias, mean, rstd, ctx.groups, ctx.act).to(ctx.dtype)
    sizes = None if conv_bias is None else list(conv_bias.shape)
    dy, dconv, dconv_bias = torch.ops.aten.convolution_backward(
        dout, y, conv_weight.to(ctx.dtype), sizes, [1, 1], [ctx.padding] * 2, [1, 1], False, [0, 0], 1,
        [True, needs_conv, needs_conv_bias],
    )  # fmt: skip
    del y
    dy = dy.to(x.dtype)
    dx, dweight, dbias, dpre_bias = norm_act_backward(
        dy, dtotal, x, weight, bias, pre_bias, mean, rstd, ctx.groups, ctx.eps, ctx.act, needs_pre_bias
    )
    return (
        dx,
        dweight.to(weight.dtype),
        dbias.to(bias.dtype),
        dpre_bias.to(ctx.pre_bias_dtype) if needs_pre_bias else None,
        dconv.to(conv_weight.dtype) if needs_conv else None,
        None if conv_bias is None or not needs_conv_bias else dconv_bias.to(conv_bias.dtype),
    )


def _differentiable_gradients(ctx: Any, dout: Tensor, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same as a graph: both steps run again as differentiable operators."""
    inputs: list[Any] = [
        t.view_as(t) if t is not None and t.requires_grad else t for t in ctx.saved_tensors[:6]
    ]
    x, weight, bias, pre_bias, conv_weight, conv_bias = inputs
    y = norm_act(x, weight, bias, ctx.groups, ctx.eps, ctx.act, pre_bias, backend="triton")
    out = _convolve(y, conv_weight, conv_bias, ctx.padding, ctx.dtype)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, dout, create_graph=True, allow_unused=True))
    dx, dweight, dbias, dpre_bias, dconv, dconv_bias = (
        next(found) if t is not None and t.requires_grad else None for t in inputs
    )
    if ctx.residual:
        dx = dtotal if dx is None else dx if dtotal is None else dx + dtotal
        dpre_bias = _pre_bias_gradient(ctx, dx)
    return dx, dweight, dbias, dpre_bias, dconv, dconv_bias


def _pre_bias_gradient(ctx: Any, dsum: Tensor | None) -> Tensor | None:
    """Of what is added to x before the sum."""
    if dsum is None or not ctx.needs_input_grad[4]:
        return None
    return dsum.sum((0, 2, 3)).to(ctx.pre_bias_dtype)

"""LPIPS's distance of two feature maps in one step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import differentiate_backward
from ..dispatch import Backend, BackendError, resolve_backend
from ..row_norm_act import MAX_CHANNELS
from ..tensors import check_channel_vector, check_floating, check_like, compute_dtype, dense, like

__all__ = ["lpips_head"]


def lpips_head(
    a: Tensor,  # [N, C, H, W]
    b: Tensor,  # like a
    weight: Tensor,  # [C]
    eps: float = 1e-10,
    backend: Backend = "auto",
) -> Tensor:
    """Distance of two feature maps: mean over pixels of sum_c weight (u - v)^2, u = a / sqrt(sum_c
    a^2 + eps).

    Args:
        a, b: features, channels_last (fast) or contiguous. Gradients that are not needed are not
            computed.
        weight: one value per channel in the dtype of `a`, or in fp32 for half-precision features.
        eps: added to the squared norm inside the root; above zero, as the gradient of a plain norm
            at zero is NaN.
        backend: "triton" (kernels, at most 4096 channels, no gradient to `weight`), "torch" (native
            operators), or "auto": the kernels on an NVIDIA GPU if `weight` needs no gradient, else
            torch.

    Returns:
        [N] in fp32, or in fp64 for fp64 features. Twice differentiable.

    Raises:
        BackendError: "triton" was requested and cannot run on `a` or compute the gradient of
            `weight`.
        ValueError: an invalid shape, device or dtype; the message names the argument.

    Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
    Metric", eq. 1.
    """
    _check(a, b, weight, eps)
    if resolve_backend("lpips_head", backend, a) == "triton":
        obstacle = _obstacle(a, weight)
        if obstacle is None:
            a = dense(a)
            return _forward(a, like(b, a), weight, eps)
        if backend == "triton":
            raise BackendError(
                f"lpips_head: backend='triton' cannot run here: {obstacle}; use backend='auto' or 'torch'"
            )
    return _native(a, b, weight, eps)


def _check(a: Tensor, b: Tensor, weight: Tensor, eps: float) -> None:
    op = "lpips_head"
    check_floating(op, "a", a)
    if a.ndim != 4 or 0 in a.shape[1:]:
        raise ValueError(
            f"{op}: a has shape {tuple(a.shape)}, expected [N, C, H, W] with at least one channel and pixel"
        )
    check_like(op, "b", b, a)
    check_channel_vector(op, "weight", weight, a)
    if not eps > 0:
        raise ValueError(
            f"{op}: eps is {eps}, expected a number above zero: norms of zero have no gradient without it"
        )


def _obstacle(a: Tensor, weight: Tensor) -> str | None:
    if weight.requires_grad and torch.is_grad_enabled():
        return "weight requires a gradient, which the kernels do not compute"
    if a.shape[1] > MAX_CHANNELS:
        return f"a has {a.shape[1]} channels, the kernels take at most {MAX_CHANNELS}"
    return None


def _native(a: Tensor, b: Tensor, weight: Tensor, eps: float) -> Tensor:
    u, v = _unit(a, eps)[0], _unit(b, eps)[0]
    with torch.autocast(a.device.type, enabled=False):
        # a 1x1 convolution has a dense gradient; that of a sum over channels is an expanded view,
        # twice as slow on a CPU
        return F.conv2d((u - v).square(), weight.to(u.dtype).view(1, -1, 1, 1)).mean(dim=(1, 2, 3))


@torch.library.custom_op("latentae_kernels::lpips_head_forward", mutates_args=())
def _forward(a: Tensor, b: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Distance of each sample [N], in the compute dtype."""
    from .kernels import launch_forward

    a = dense(a)
    return launch_forward(a, like(b, a), weight, eps)


@_forward.register_fake
def _(a, b, weight, eps):
    return a.new_empty(a.shape[0], dtype=compute_dtype(a))


@torch.library.custom_op("latentae_kernels::lpips_head_backward", mutates_args=())
def _backward(
    gradient: Tensor, a: Tensor, b: Tensor, weight: Tensor, eps: float, needs_a: bool, needs_b: bool
) -> tuple[Tensor, Tensor]:
    """da and db in the memory format of a, empty where not needed."""
    from .kernels import launch_backward

    a = dense(a)
    return launch_backward(gradient, a, like(b, a), weight, eps, needs_a, needs_b)


@_backward.register_fake
def _(gradient, a, b, weight, eps, needs_a, needs_b):
    a = dense(a)
    return tuple(torch.empty_like(a) if needed else a.new_empty(0) for needed in (needs_a, needs_b))


def _closed_form(
    gradient: Tensor, a: Tensor, b: Tensor, weight: Tensor, eps: float, needs_a: bool, needs_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Closed form of lpips_head's gradient; it recomputes the norms, so its derivative is the
    second derivative.

    With u = a r0, v = b r1 and e = 2 g w (u - v) / HW: da = r0 (e - u sum_c(e u)), db = -r1 (e - v
    sum_c(e v)).

    Returns:
        da and db in the dtype of `a`, None where not needed.
    """
    (u, r0), (v, r1) = _unit(a, eps), _unit(b, eps)
    scale = gradient.to(u.dtype).view(-1, 1, 1, 1) * weight.to(u.dtype).view(1, -1, 1, 1)
    e = (2 / a.shape[2:].numel()) * scale * (u - v)
    da = (r0 * (e - u * (e * u).sum(dim=1, keepdim=True))).to(a.dtype) if needs_a else None
    db = (r1 * (v * (e * v).sum(dim=1, keepdim=True) - e)).to(b.dtype) if needs_b else None
    return da, db


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Features of unit length over channels, and 1 / length, in the compute dtype."""
    x = x.to(compute_dtype(x))
    scale = torch.rsqrt(x.square().sum(dim=1, keepdim=True) + eps)
    return x * scale, scale


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    a, b, weight, ctx.eps = inputs
    ctx.save_for_backward(a, b, weight)


def _gradient(ctx: Any, gradient: Tensor) -> tuple:
    needs_a, needs_b = ctx.needs_input_grad[:2]
    da, db = _backward(gradient, *ctx.saved_tensors, ctx.eps, needs_a, needs_b)
    return da if needs_a else None, db if needs_b else None, None, None


_forward.register_autograd(_gradient, setup_context=_save)
differentiate_backward(_backward, _closed_form, tensors=4)

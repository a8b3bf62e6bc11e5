"""What LPIPS does with two feature maps, in one call: normalize over channels, weighted squared difference, mean over pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_floating
from .dispatch import Backend, BackendError, resolve_backend
from .layout import dense, like
from .lpips_head_ops import lpips_head_forward
from .row_norm_act import MAX_CHANNELS

__all__ = ["lpips_head"]


def lpips_head(
    a: Tensor,  # [N, C, H, W]
    b: Tensor,  # like a
    weight: Tensor,  # [C]
    eps: float = 1e-10,
    backend: Backend = "auto",
) -> Tensor:
    """Distance of two feature maps: mean over pixels of sum_c weight (u - v)^2 with u = a / sqrt(sum_c a^2 + eps), v likewise.

    Args:
        a, b: features, channels last (the fast order) or first; both are differentiable, and a gradient that nobody needs is neither
            computed nor written.
        weight: one value a channel, in the dtype of `a`, or fp32 beside half-precision features; a constant for the kernels.
        eps: added to the squared norm, above zero and inside the root: the gradient of a plain norm at zero is NaN.
        backend: "triton" (the fused kernels, up to 4096 channels, no gradient to `weight`), "torch" (native operators), or "auto":
            the kernels on an NVIDIA GPU if `weight` needs no gradient, else torch.

    Returns:
        [N], in fp32 for half-precision features (a sum over so many pixels deserves it; fp64 stays fp64). Twice differentiable.

    Raises:
        BackendError: "triton" was asked for and can't run on `a`, or would owe `weight` a gradient.
        ValueError: an argument of the wrong kind, shape, device or dtype; the message names it.

    Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", eq. 1.
    """
    _check(a, b, weight, eps)
    if resolve_backend("lpips_head", backend, a) == "triton":
        obstacle = _obstacle(a, weight)
        if obstacle is None:
            a = dense(a)
            return lpips_head_forward(a, like(b, a), weight, eps)
        if backend == "triton":
            raise BackendError(
                f"lpips_head: backend='triton' can't run here: {obstacle}; use backend='auto' or 'torch'"
            )
    return _native(a, b, weight, eps)


def _check(a: Tensor, b: Tensor, weight: Tensor, eps: float) -> None:
    op = "lpips_head"
    check_floating(op, "a", a)
    if a.ndim != 4 or 0 in a.shape[1:]:
        raise ValueError(
            f"{op}: a has shape {tuple(a.shape)}, expected [N, C, H, W] with at least one channel and one pixel"
        )
    half = a.dtype in (torch.float16, torch.bfloat16)
    dtypes = {"b": (a.dtype,), "weight": (a.dtype, torch.float32) if half else (a.dtype,)}
    for name, tensor, shape in (("b", b, a.shape), ("weight", weight, a.shape[1:2])):
        if tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} beside a {tuple(a.shape)}"
            )
        if tensor.device != a.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} and a on {a.device}; move one of them")
        if tensor.dtype not in dtypes[name]:
            expected = " or ".join(map(str, dtypes[name]))
            raise ValueError(
                f"{op}: {name} has dtype {tensor.dtype} beside a in {a.dtype}; expected {expected}"
            )
    if not eps > 0:
        raise ValueError(
            f"{op}: eps is {eps}, expected a number above zero: norms of zero have no gradient without it"
        )


def _obstacle(a: Tensor, weight: Tensor) -> str | None:
    if weight.requires_grad and torch.is_grad_enabled():
        return "weight requires a gradient, which the kernels don't compute"
    if a.shape[1] > MAX_CHANNELS:
        return f"a has {a.shape[1]} channels, the kernels take up to {MAX_CHANNELS}"
    return None


def _native(a: Tensor, b: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    u, v = (t.to(wide) * torch.rsqrt(t.to(wide).square().sum(dim=1, keepdim=True) + eps) for t in (a, b))
    with torch.autocast(a.device.type, enabled=False):
        # a 1x1 convolution: its gradient comes out dense; that of a sum over channels is an expanded view, at twice the time on a CPU
        return F.conv2d((u - v).square(), weight.to(wide).view(1, -1, 1, 1)).mean(dim=(1, 2, 3))

"""GroupNorm on a CPU, accurate for any mean and any number of pixels.

In channels_last torch's operator sums x and x^2 pixel by pixel in fp32. Its relative error is 7e-3
where a group's mean is 300 standard deviations, and 2e-4 for standard normal values of 1024 x 1024
pixels or for 256 x 256 pixels with flat regions, where equal terms round alike. On few pixels
around zero the operator is accurate and fastest. Large maps are therefore normalized in blocks, and
a result whose statistics show a large mean is computed again from centered values: GroupNorm and
its gradient do not change when a constant is subtracted from a group. Figures:
docs/decisions/0018-cpu-group-norm.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import is_ordinary
from ..tensors import compute_dtype

__all__ = ["channel_moments", "group_moments", "group_norm", "norm_act_gradients"]

_BLOCK = 1024  # pixels that the operator sums at a time
_FEW = 2 * _BLOCK  # pixels up to which the operator is accurate
_FEW_IN_HALF = 2**16  # the same in half precision: the operator's error is below the rounding of y
# Groups are centered if their mean is more than _FAR standard deviations; below it the operator's
# error stays under 2e-5.
_FAR = 2.0
_TINY = 1e-20  # eps of a block, which may be flat
# Moments are computed around the mean of one row in 17, which errs by at most sqrt(17) standard
# deviations.
_SAMPLE = 17
_STRIP = 2**17  # values of a strip that stays in the cache


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`F.group_norm` with a relative error of at most 2e-5 in fp32 on a CPU, forward and backward.

    An export contains the operator itself. A compiler, autograd's forward mode and transforms of
    `torch.func` cannot branch on values, so there the mean is always subtracted. Many pixels are
    then summed by the compiler: accurately by inductor, like torch's operator by "eager" and
    "aot_eager".

    Args:
        x: [N, C, *spatial].
        groups: number of groups; must divide C.
        weight, bias: [C].
        eps: added to the variance.
    """
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if not x.is_cpu or x.dtype == torch.float64 or x.ndim < 3 or exporting:
        return F.group_norm(x, groups, weight, bias, eps)
    if not is_ordinary(x, weight, bias):
        center = x.detach().unflatten(1, (groups, -1)).mean(tuple(range(2, x.ndim + 1)))
        return F.group_norm(x - _per_channel(center, x), groups, weight, bias, eps)
    if not x.numel():
        return F.group_norm(x, groups, weight, bias, eps)
    y, mean, rstd = _normalize(x, groups, weight, bias, eps)
    variance = (rstd.float().pow(-2) - eps).clamp(min=0)
    if (mean.float().square() > _FAR**2 * variance).any():
        y = _normalize(x - _per_channel(mean, x), groups, weight, bias, eps)[0]
    return y


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 mean and variance [N, C] of `x` [N, C, H, W], accurate for any mean and size."""
    wide = compute_dtype(x)
    if not x.is_cpu:
        moments = [torch.batch_norm_update_stats(sample.to(wide), None, None, 0.0) for sample in x.split(1)]
        mean, variance = (torch.stack(values).double() for values in zip(*moments, strict=True))
        return mean, variance
    height = x.shape[2]
    center = x[:, :, min(_SAMPLE, height) // 2 :: _SAMPLE].mean((2, 3), keepdim=True, dtype=wide)
    total, squares = (torch.zeros(x.shape[:2], dtype=torch.float64) for _ in range(2))
    for samples, rows in _strips(x):
        difference = x[samples, :, rows] - center[samples]
        total[samples] += difference.sum((2, 3))
        squares[samples] += difference.square_().sum((2, 3))
    mean, square = total / x.shape[2:].numel(), squares / x.shape[2:].numel()
    return center.double().flatten(1) + mean, (square - mean.square()).clamp(min=0)


def group_moments(mean: Tensor, variance: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [N, groups] of groups of channels, from those of the channels [N, C].

    A group's variance is the mean of its channels' variances and the variance of their means.
    """
    mean, variance = mean.unflatten(1, (groups, -1)), variance.unflatten(1, (groups, -1))
    center = mean.mean(2, keepdim=True)
    return center.squeeze(2), (variance + (mean - center).square()).mean(2)


def _strips(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Samples and rows of strips of `x` [N, C, H, W]: several samples, or rows of one."""
    sample = max(x[0].numel(), 1)
    rows = max(1, x.shape[2] * _STRIP // sample)
    samples = max(1, _STRIP // sample)
    for n in range(0, x.shape[0], samples):
        for row in range(0, x.shape[2], rows):
            yield slice(n, n + samples), slice(row, row + rows)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """[N, groups] -> [N, C, 1, ...], in the dtype of `x` and outside the graph."""
    repeated = values.detach().to(x.dtype).repeat_interleave(x.shape[1] // values.shape[1], 1)
    return repeated[(..., *(None,) * (x.ndim - 2))]


def _normalize(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and 1/std [N, groups]."""
    samples, channels, *size = x.shape
    pixels = math.prod(size)
    if x.ndim > 3 and x.stride(1) == 1 and pixels > (_FEW if x.dtype == torch.float32 else _FEW_IN_HALF):
        tokens = x.float().movedim(1, -1).reshape(samples, -1, _block(pixels), channels)
        y, mean, rstd = _Blocks.apply(tokens, weight, bias, groups, eps)
        return y.reshape(samples, *size, channels).movedim(-1, 1).to(x.dtype), mean, rstd
    return torch.native_group_norm(x, weight, bias, samples, channels, pixels, groups, eps)


@functools.cache
def _block(pixels: int) -> int:
    """The divisor up to 2048 nearest to 1024 as a ratio; `pixels` if only tiny blocks would fit."""
    divisors = [d for d in range(1, 2 * _BLOCK + 1) if pixels % d == 0]
    found = min(divisors, key=lambda d: abs(math.log(d / _BLOCK)))
    return found if found >= 16 else pixels


class _Blocks(torch.autograd.Function):
    """GroupNorm of [N, blocks, pixels, C] in fp32: normalize each block, then correct by all."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        samples, blocks, pixels, channels = x.shape
        y, *found = torch.native_group_norm(
            _images(x), None, None, samples * blocks, channels, pixels, groups, _TINY
        )
        means, stds = (
            found[0].view(samples, blocks, groups),
            found[1].view(samples, blocks, groups).reciprocal(),
        )
        mean = means.mean(1, keepdim=True)
        rstd = ((stds.square() + (means - mean).square()).mean(1, keepdim=True) + eps).rsqrt()
        scale, shift = (_spread(values, channels) * weight for values in (stds * rstd, (means - mean) * rstd))
        y = y.movedim(1, -1).view(x.shape)
        torch.addcmul(shift + bias, y, scale, out=y)
        mean, rstd = mean.squeeze(1), rstd.squeeze(1)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        ctx.mark_non_differentiable(mean, rstd)
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        samples, blocks, pixels, channels = x.shape
        if torch.is_grad_enabled():
            dy, x = dy.movedim(-1, 1), x.movedim(-1, 1)
            closed_form = norm_act_gradients(dy, None, x, weight, bias, None, ctx.groups, ctx.eps, "identity")
            dx, dweight, dbias = closed_form[:3]
            return dx.movedim(1, -1), dweight.to(weight.dtype), dbias.to(bias.dtype), None, None
        dy, gamma, dx = dy.contiguous(), weight.to(x.dtype), None
        sums = [
            torch.ops.aten.native_group_norm_backward(
                _images(dy[n : n + 1]), _images(x[n : n + 1]), mean[n].repeat(blocks, 1),
                rstd[n].repeat(blocks, 1), gamma, blocks, channels, pixels, ctx.groups, [False, True, True],
            )[1:]
            for n in range(samples)
        ]  # fmt: skip
        dweight, dbias = torch.stack([s for s, _ in sums]), torch.stack([s for _, s in sums])
        if ctx.needs_input_grad[0]:
            # dx = (gamma dy - A - B xh) / std, with A and B the means over a group of gamma dy and
            # gamma dy xh
            count = blocks * pixels * channels // ctx.groups
            a, b = (
                (gamma * values).unflatten(1, (ctx.groups, -1)).sum(2) / count for values in (dbias, dweight)
            )
            slope = -b * rstd.square()
            shift = -a * rstd - slope * mean
            scale, slope, shift = (_spread(values.unsqueeze(1), channels) for values in (rstd, slope, shift))
            dx = torch.addcmul(shift, x, slope).addcmul_(dy, scale * gamma)
        return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype), None, None


def _images(tokens: Tensor) -> Tensor:
    """[N, blocks, pixels, C] -> [N * blocks, C, pixels, 1], channels last."""
    return tokens.flatten(0, 1).unsqueeze(2).movedim(-1, 1)


def _spread(values: Tensor, channels: int) -> Tensor:
    """[N, blocks, groups] -> [N, blocks, 1, C]."""
    return values.repeat_interleave(channels // values.shape[2], 2).unsqueeze(2)


def norm_act_gradients(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,  # what was normalized, before pre_bias
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    pre_bias: Tensor | None,  # [C]
    groups: int,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Closed form of norm_act's gradient; it recomputes the statistics, so its derivative is the
    second derivative.

    With xh = (x - mean) / std, z = gamma xh + beta, dz = dy act'(z), A and B the means over a group
    of gamma dz and gamma dz xh: dx = (gamma dz - A - B xh) / std (+ dtotal), dgamma = sum dz xh,
    dbeta = sum dz.

    Returns:
        dx in the dtype of `x`; dgamma, dbeta and the sum of dx over samples and pixels, [C], in the
        compute dtype.
    """
    wide, channels = compute_dtype(x), (1, -1) + (1,) * (x.ndim - 2)
    others = [0, *range(2, x.ndim)]
    value, gamma = x.to(wide), weight.to(wide).view(channels)
    if pre_bias is not None:
        value = value + pre_bias.to(wide).view(channels)
    xh, rstd = _normalized(value, groups, eps)
    xh_full = xh.reshape(x.shape)
    dz = dy.to(wide)
    if act == "silu":
        z = gamma * xh_full + bias.to(wide).view(channels)
        s = torch.sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    scaled = (gamma * dz).reshape(xh.shape)
    a, b = scaled.mean(dim=-1, keepdim=True), (scaled * xh).mean(dim=-1, keepdim=True)
    dx = (rstd * (scaled - a - xh * b)).reshape(x.shape)
    if dtotal is not None:
        dx = dx + dtotal.to(wide)
    return dx.to(x.dtype), (dz * xh_full).sum(others), dz.sum(others), dx.sum(others)


def _normalized(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / std as [N, groups, elements] and 1 / std [N, groups, 1]."""
    grouped = x.reshape(x.shape[0], groups, x[:1].numel() // groups)
    centered = grouped - grouped.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(dim=-1, keepdim=True) + eps)
    return centered * rstd, rstd

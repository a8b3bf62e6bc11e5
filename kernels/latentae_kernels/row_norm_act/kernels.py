"""Triton kernels of `row_norm_act`, their tiles and launches.

A program keeps a tile of complete rows in registers: a few pixels, all their channels. Statistics,
activation and the input's gradient need one read. The parameters' gradients are summed over the
tiles of a program into one slot of partial sums, and the slots are added in a fixed order: without
atomics, two runs are bit-equal.

Element (n, p, c) is at n*C*HW + p*C + c (NHWC) or n*C*HW + c*HW + p (NCHW); every kernel handles
both.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launcher import Plan, accumulator, launch, processors, recorded_launches
from ..tensors import compute_dtype, is_channels_last

__all__ = ["launch_backward", "launch_forward", "plans", "row_settings", "row_tile"]

SECTOR = 32  # bytes of a memory transaction: an NCHW tile takes at least as many of each channel
# elements in a tile of four warps: 32 per thread forward; 8 backward, where a thread has two tiles
# of x and dy and two of parameter gradients
FORWARD, BACKWARD = 4096, 1024
WARPS = 20  # per multiprocessor in the backward pass: about as many as fit, so that all programs run at once


@triton.jit
def row_tile(index, HW, C: tl.constexpr, NHWC: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sample of tile `index`, the tile's 64-bit start, offsets inside it, and mask."""
    tiles = tl.cdiv(HW, ROWS)
    n = (index // tiles).to(tl.int64)
    first = (index % tiles).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK_C)[None, :]
    mask = (rows < HW - first) & (cols < C)
    if NHWC:
        base = (n * HW + first) * C
        offsets = rows * C + cols
    else:
        base = n * HW * C + first
        offsets = cols.to(tl.int64) * HW + rows
    return n, base, offsets, mask


@triton.jit
def _normalize(x, mask, C: tl.constexpr, EPS: tl.constexpr, LAYER: tl.constexpr):
    """xh and 1/std [ROWS, 1]; `x` is zero where masked."""
    if LAYER:
        x = tl.where(mask, x - tl.sum(x, 1, keep_dims=True) / C, 0.0)
        # again: the mean's own rounding, visible where mean >> std
        x = tl.where(mask, x - tl.sum(x, 1, keep_dims=True) / C, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / C + EPS)
    return x * rstd, rstd


@triton.jit
def _affine(
    weight_ptr, bias_ptr, C: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr
):
    cols = tl.arange(0, BLOCK_C)
    gamma = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(ACC)
    beta = tl.zeros([BLOCK_C], ACC)
    if BIAS:
        beta = tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(ACC)
    return gamma[None, :], beta[None, :]


@triton.jit
def row_norm_act_forward(
    x_ptr, weight_ptr, bias_ptr, y_ptr, HW,
    C: tl.constexpr, NHWC: tl.constexpr, EPS: tl.constexpr, LAYER: tl.constexpr, SILU: tl.constexpr,
    BIAS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act(gamma * xh + beta) of one tile."""
    _, base, offsets, mask = row_tile(tl.program_id(0), HW, C, NHWC, ROWS, BLOCK_C)
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(ACC)
    gamma, beta = _affine(weight_ptr, bias_ptr, C, BIAS, ACC, BLOCK_C)
    xh, _ = _normalize(x, mask, C, EPS, LAYER)
    y = xh * gamma + beta
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + base + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fetch(
    x_ptr, dy_ptr, index, tiles, HW,
    C: tl.constexpr, NHWC: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _, base, offsets, mask = row_tile(index, HW, C, NHWC, ROWS, BLOCK_C)
    # as a block, because Triton's interpreter can't broadcast a scalar truth value
    mask = mask & (index + tl.zeros([1, 1], tl.int32) < tiles)
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0)
    return x, tl.load(dy_ptr + base + offsets, mask=mask, other=0.0)


@triton.jit
def row_norm_act_backward(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, dx_ptr, dweight_ptr, dbias_ptr, HW, tiles,
    C: tl.constexpr, NHWC: tl.constexpr, EPS: tl.constexpr, LAYER: tl.constexpr, SILU: tl.constexpr,
    BIAS: tl.constexpr, PARAMETERS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of this program's tiles; sums of dz * xh and dz, into row `program` of [programs, C]."""
    gamma, beta = _affine(weight_ptr, bias_ptr, C, BIAS, ACC, BLOCK_C)
    dgamma = tl.zeros([ROWS, BLOCK_C], ACC)
    dbeta = tl.zeros([ROWS, BLOCK_C], ACC)
    step = tl.num_programs(0)
    x_next, dy_next = _fetch(x_ptr, dy_ptr, tl.program_id(0), tiles, HW, C, NHWC, ROWS, BLOCK_C)
    for index in range(tl.program_id(0), tiles, step):
        x = x_next.to(ACC)
        dz = dy_next.to(ACC)
        # the next tile is on its way while this one is worked on
        x_next, dy_next = _fetch(x_ptr, dy_ptr, index + step, tiles, HW, C, NHWC, ROWS, BLOCK_C)
        _, base, offsets, mask = row_tile(index, HW, C, NHWC, ROWS, BLOCK_C)
        xh, rstd = _normalize(x, mask, C, EPS, LAYER)
        if SILU:
            z = xh * gamma + beta
            s = tl.sigmoid(z)
            dz = dz * s * (1.0 + z * (1.0 - s))  # zero where masked, since dy is
        scaled = gamma * dz
        dx = scaled - xh * (tl.sum(scaled * xh, 1, keep_dims=True) / C)
        if LAYER:
            dx -= tl.sum(scaled, 1, keep_dims=True) / C
        tl.store(dx_ptr + base + offsets, (dx * rstd).to(dx_ptr.dtype.element_ty), mask=mask)
        if PARAMETERS:
            dgamma += dz * xh
            dbeta += dz
    if PARAMETERS:
        cols = tl.arange(0, BLOCK_C)
        slot = tl.program_id(0) * C + cols
        tl.store(dweight_ptr + slot, tl.sum(dgamma, 0), mask=cols < C)
        if BIAS:
            tl.store(dbias_ptr + slot, tl.sum(dbeta, 0), mask=cols < C)


def row_settings(x: Tensor, elements: int, merge_samples: bool = False) -> dict[str, Any]:
    """The tile [ROWS, BLOCK_C] of a program and the arguments that all row kernels share.

    Args:
        x: [N, C, *spatial]. On few pixels tiles are smaller, so that every multiprocessor has work.
        elements: size of a tile of four warps; a tile is up to four times larger where C needs it.
        merge_samples: treat an NHWC batch as one long image.
    """
    (samples, channels), pixels, channels_last = x.shape[:2], x.shape[2:].numel(), is_channels_last(x)
    if merge_samples and channels_last:
        samples, pixels = 1, samples * pixels
    block_c = triton.next_power_of_2(channels)
    narrowest = 1 if channels_last else max(1, min(SECTOR // x.element_size(), 4 * elements // block_c))
    rows = min(max(elements // block_c, narrowest), triton.next_power_of_2(pixels))
    while rows > narrowest and samples * -(-pixels // rows) < 2 * processors(x.device):
        rows //= 2
    warps = min(max(4 * rows * block_c // elements, 1), 16)
    sizes = {"HW": pixels, "C": channels, "NHWC": channels_last, "tiles": samples * -(-pixels // rows)}
    return sizes | {"ACC": accumulator(x), "ROWS": rows, "BLOCK_C": block_c, "num_warps": warps}


def _settings(
    x: Tensor, bias: Tensor | None, eps: float, norm: str, act: str, elements: int
) -> dict[str, Any]:
    modes = {"LAYER": norm == "layer", "SILU": act == "silu", "BIAS": bias is not None, "EPS": eps}
    return row_settings(x, elements, merge_samples=True) | modes


def launch_forward(
    x: Tensor,  # [N, C, *spatial], dense
    weight: Tensor,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    norm: str,
    act: str,
) -> Tensor:
    """y like x."""
    y = torch.empty_like(x)
    if x.numel():
        settings = _settings(x, bias, eps, norm, act, FORWARD)
        tensors = (x, weight, x if bias is None else bias, y)
        launch(row_norm_act_forward, (settings["tiles"],), tensors, settings)
    return y


def launch_backward(
    dy: Tensor,  # in the format of x
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm: str,
    act: str,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x; dweight and dbias [C] in the compute dtype, empty where not needed."""
    dx, acc = torch.empty_like(x), compute_dtype(x)
    widths = x.shape[1] * parameters, x.shape[1] * (parameters and bias is not None)
    if not x.numel():
        dweight, dbias = (x.new_zeros(width, dtype=acc) for width in widths)
        return dx, dweight, dbias
    settings = _settings(x, bias, eps, norm, act, BACKWARD) | {"PARAMETERS": parameters}
    programs = min(settings["tiles"], processors(x.device) * max(WARPS // settings["num_warps"], 1))
    dweight, dbias = (x.new_empty((programs, width), dtype=acc) for width in widths)
    tensors = (dy, x, weight, x if bias is None else bias, dx, dweight, dbias)
    launch(row_norm_act_backward, (programs,), tensors, settings)
    return dx, dweight.sum(0), dbias.sum(0)


def plans() -> list[Plan]:
    """Both kernels for 256-pixel activations and for the widest row, with every option on."""
    found = []
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for channels, channels_last in ((96, True), (128, True), (512, True), (4096, True), (128, False)):
            side = 256 if channels <= 512 else 16
            layout = torch.channels_last if channels_last else torch.contiguous_format
            x = torch.empty(1, channels, side, side, dtype=dtype, device="meta", memory_format=layout)
            vector = x.new_empty(channels, dtype=torch.float32)
            with recorded_launches() as launches:
                launch_forward(x, vector, vector, 1e-6, "layer", "silu")
                launch_backward(x, x, vector, vector, 1e-6, "layer", "silu", True)
            for direction, (kernel, arguments) in zip(("forward", "backward"), launches, strict=True):
                name = f"row_norm_act/{direction} {'nhwc' if channels_last else 'nchw'} {label} C={channels}"
                found.append(Plan(name, kernel, arguments, registers=128 if channels <= 512 else 160))
    return found

"""Triton kernels of `lpips_head` and their launches.

A program keeps a few pixels of both feature maps in registers, all their channels: norms,
difference and both gradients need one read. Each program writes one partial sum to its own slot;
the slots are added in a fixed order, so two runs are bit-equal. Memory formats and tiles are those
of `row_norm_act`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launcher import Plan, launch, recorded_launches
from ..row_norm_act.kernels import row_settings, row_tile
from ..tensors import compute_dtype

__all__ = ["launch_backward", "launch_forward", "plans"]

ELEMENTS = 2048  # of each map in a tile of four warps


@triton.jit
def _unit(x_ptr, offsets, mask, EPS: tl.constexpr, ACC: tl.constexpr):
    """Features of unit length, and 1/length [ROWS, 1]."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
    scale = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) + EPS)
    return x * scale, scale


@triton.jit
def lpips_head_forward(
    a_ptr, b_ptr, weight_ptr, sums_ptr, HW,
    C: tl.constexpr, NHWC: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum of sum_c weight (u - v)^2 over one tile's pixels, into slot `tile` of [N * tiles]."""
    _, base, offsets, mask = row_tile(tl.program_id(0), HW, C, NHWC, ROWS, BLOCK_C)
    cols = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(ACC)[None, :]
    u, _ = _unit(a_ptr + base, offsets, mask, EPS, ACC)
    v, _ = _unit(b_ptr + base, offsets, mask, EPS, ACC)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.sum(weight * (u - v) * (u - v), 1), 0))


@triton.jit
def lpips_head_backward(
    gradient_ptr, a_ptr, b_ptr, weight_ptr, da_ptr, db_ptr, HW,
    C: tl.constexpr, NHWC: tl.constexpr, EPS: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """da = r0 (e - u sum(e u)), db = -r1 (e - v sum(e v)) with e = 2 g weight (u - v) / HW."""
    n, base, offsets, mask = row_tile(tl.program_id(0), HW, C, NHWC, ROWS, BLOCK_C)
    cols = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(ACC)[None, :]
    u, r0 = _unit(a_ptr + base, offsets, mask, EPS, ACC)
    v, r1 = _unit(b_ptr + base, offsets, mask, EPS, ACC)
    e = (2.0 * tl.load(gradient_ptr + n).to(ACC) / HW) * weight * (u - v)
    if DA:
        da = r0 * (e - u * tl.sum(e * u, 1, keep_dims=True))
        tl.store(da_ptr + base + offsets, da.to(da_ptr.dtype.element_ty), mask=mask)
    if DB:
        db = r1 * (v * tl.sum(e * v, 1, keep_dims=True) - e)
        tl.store(db_ptr + base + offsets, db.to(db_ptr.dtype.element_ty), mask=mask)


def launch_forward(a: Tensor, b: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Mean distance of each sample [N], in the compute dtype; `b` in the memory format of `a`."""
    acc = compute_dtype(a)
    if not a.numel():
        return a.new_zeros(a.shape[0], dtype=acc)
    settings = {**row_settings(a, ELEMENTS), "EPS": eps}
    sums = a.new_empty((a.shape[0], settings["tiles"] // a.shape[0]), dtype=acc)
    launch(lpips_head_forward, (settings["tiles"],), (a, b, weight, sums), settings)
    return sums.sum(1) / settings["HW"]


def launch_backward(
    gradient: Tensor,  # [N]
    a: Tensor,  # [N, C, H, W], dense
    b: Tensor,  # in the format of a
    weight: Tensor,  # [C]
    eps: float,
    needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor]:
    """da and db like a; a gradient that is not needed is empty and not computed."""
    da, db = (torch.empty_like(a) if needed else a.new_empty(0) for needed in (needs_a, needs_b))
    if a.numel():
        settings = row_settings(a, ELEMENTS) | {"EPS": eps, "DA": needs_a, "DB": needs_b}
        tensors = (gradient.contiguous(), a, b, weight, da, db)
        launch(lpips_head_backward, (settings["tiles"],), tensors, settings)
    return da, db


def plans() -> list[Plan]:
    """Both kernels for VGG16's features of 256-pixel images and for the widest row."""
    found = []
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for channels, channels_last in ((64, True), (128, True), (512, True), (4096, True), (128, False)):
            size = (8, channels, 256, 256 * 64 // channels)
            layout = torch.channels_last if channels_last else torch.contiguous_format
            a = torch.empty(size, dtype=dtype, device="meta", memory_format=layout)
            weight, gradient = (a.new_empty(length, dtype=torch.float32) for length in (channels, 8))
            with recorded_launches() as launches:
                launch_forward(a, a, weight, 1e-10)
                launch_backward(gradient, a, a, weight, 1e-10, True, False)
                launch_backward(gradient, a, a, weight, 1e-10, True, True)
            names = ("forward", "backward da", "backward da db")
            for direction, (kernel, arguments) in zip(names, launches, strict=True):
                name = f"lpips_head/{direction} {'nhwc' if channels_last else 'nchw'} {label} C={channels}"
                found.append(Plan(name, kernel, arguments))
    return found

"""Triton kernels of `lpips_head`, and their launchers.

A program holds a few pixels of both feature maps in registers, all their channels: norms, difference and, in the backward pass, both
gradients need one read. Each program writes one partial sum to a slot of its own; the slots are added in a fixed order, so two runs
are equal to the bit. Memory orders and tiles are those of `row_norm_act`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import is_channels_last
from .row_norm_act_kernels import accumulator, choose_rows, on_device, processors, row_tile

if TYPE_CHECKING:
    from .aot import Plan

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
    C: tl.constexpr, NHWC: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum over the pixels of one tile of sum_c weight (u - v)^2, into slot `tile` of [N * tiles]."""
    _, base, offsets, mask = row_tile(tl.program_id(0), HW, C, NHWC, ROWS, BLOCK_C)
    cols = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(ACC)[None, :]
    u, _ = _unit(a_ptr + base, offsets, mask, EPS, ACC)
    v, _ = _unit(b_ptr + base, offsets, mask, EPS, ACC)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.sum(weight * (u - v) * (u - v), 1), 0))


@triton.jit
def lpips_head_backward(
    gradient_ptr, a_ptr, b_ptr, weight_ptr, da_ptr, db_ptr, HW,
    C: tl.constexpr, NHWC: tl.constexpr, EPS: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """da = r0 (e - u sum(e u)) and db = -r1 (e - v sum(e v)) of one tile, with e = 2 g weight (u - v) / HW."""
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


def _arguments(a: Tensor, eps: float) -> tuple[int, dict[str, Any]]:
    """Tiles a sample, and the arguments that both kernels share."""
    samples, channels, height, width = a.shape
    channels_last, pixels = is_channels_last(a), height * width
    config = choose_rows(
        samples, channels, pixels, a.element_size(), channels_last, processors(a.device), ELEMENTS
    )
    sizes = {"HW": pixels, "C": channels, "NHWC": channels_last}
    return -(-pixels // config.rows), {**sizes, "EPS": eps, "ACC": accumulator(a), **config.arguments()}


def launch_forward(a: Tensor, b: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Mean distance of each sample [N], in the precision of the maths; `b` in the memory order of `a`."""
    acc = torch.promote_types(a.dtype, torch.float32)
    if not a.numel():
        return a.new_zeros(a.shape[0], dtype=acc)
    tiles, arguments = _arguments(a, eps)
    sums = a.new_empty((a.shape[0], tiles), dtype=acc)
    with on_device(a):
        lpips_head_forward[(sums.numel(),)](a, b, weight, sums, **arguments)
    return sums.sum(1) / arguments["HW"]


def launch_backward(
    gradient: Tensor,  # [N]
    a: Tensor,  # [N, C, H, W], dense
    b: Tensor,  # in the order of a
    weight: Tensor,  # [C]
    eps: float,
    needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor]:
    """da and db like a, empty where not needed: they are neither computed nor written."""
    da, db = (torch.empty_like(a) if needed else a.new_empty(0) for needed in (needs_a, needs_b))
    if a.numel():
        tiles, arguments = _arguments(a, eps)
        arguments |= {"DA": needs_a, "DB": needs_b}
        with on_device(a):
            lpips_head_backward[(a.shape[0] * tiles,)](
                gradient.contiguous(), a, b, weight, da, db, **arguments
            )
    return da, db


def plans() -> list[Plan]:
    """What is compiled ahead of time: both kernels at the sizes of VGG16's features of 256 pixels on an H100, and the widest row."""
    from .aot import Plan

    found = []
    for itemsize, dtype in ((2, "bf16"), (4, "fp32")):
        for channels, channels_last in ((64, True), (128, True), (512, True), (4096, True), (128, False)):
            pixels = 256 * 256 * 64 // channels
            config = choose_rows(8, channels, pixels, itemsize, channels_last, 132, ELEMENTS)
            constants = {"C": channels, "NHWC": channels_last, "EPS": 1e-10, "ACC": tl.float32}
            constants |= {"ROWS": config.rows, "BLOCK_C": config.block_c}
            maps = {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "weight_ptr": "*fp32"}
            gradients = {"gradient_ptr": "*fp32", **maps, "da_ptr": f"*{dtype}", "db_ptr": f"*{dtype}"}
            order = f"{'nhwc' if channels_last else 'nchw'} {dtype} C={channels}"
            for name, kernel, pointers, flags in (
                ("forward", lpips_head_forward, {**maps, "sums_ptr": "*fp32"}, {}),
                ("backward da", lpips_head_backward, gradients, {"DA": True, "DB": False}),
                ("backward da db", lpips_head_backward, gradients, {"DA": True, "DB": True}),
            ):
                signature = pointers | {"HW": "i32"} | dict.fromkeys({**constants, **flags}, "constexpr")
                found.append(
                    Plan(
                        f"lpips_head/{name} {order}",
                        kernel,
                        signature,
                        constants | flags,
                        (*pointers, "HW"),
                        config.num_warps,
                    )
                )
    return found

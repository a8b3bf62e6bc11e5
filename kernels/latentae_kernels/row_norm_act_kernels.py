"""Triton kernels of `row_norm_act`, their launchers and configuration.

A program holds a tile of whole rows in registers: a few pixels, all their channels. Statistics, activation and the input's gradient
need no second read; the parameters' gradients are summed over many tiles per program, one slot of partial sums each, and the slots
are added in a fixed order: no atomics, so two runs are equal to the bit.

Element (n, p, c) of an activation lies at n*C*HW + p*C + c (NHWC) or n*C*HW + c*HW + p (NCHW); every kernel serves both.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import is_channels_last

if TYPE_CHECKING:
    from .aot import Plan

__all__ = [
    "RowConfig",
    "accumulator",
    "choose_rows",
    "launch_backward",
    "launch_forward",
    "on_device",
    "plans",
    "row_tile",
]

SECTOR = 32  # bytes a memory transaction moves: an NCHW tile takes at least so much of each channel
# elements in a tile of four warps: 32 a thread forward; 8 backward, which holds two tiles of x and dy and two of parameter gradients
FORWARD, BACKWARD = 4096, 1024
WARPS = 20  # per multiprocessor in the backward pass: about as many as fit, so that all programs run at once


@triton.jit
def row_tile(index, HW, C: tl.constexpr, NHWC: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sample of tile `index`, where the tile begins (64 bits: activations can exceed 2^31 elements), offsets inside it, mask."""
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
    C: tl.constexpr, NHWC: tl.constexpr, EPS: tl.constexpr, LAYER: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
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
    return tl.load(x_ptr + base + offsets, mask=mask, other=0.0), tl.load(
        dy_ptr + base + offsets, mask=mask, other=0.0
    )


@triton.jit
def row_norm_act_backward(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, dx_ptr, dweight_ptr, dbias_ptr, HW, tiles,
    C: tl.constexpr, NHWC: tl.constexpr, EPS: tl.constexpr, LAYER: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
    PARAMETERS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of every tile of this program; its sums of dz * xh and dz, into row `program` of [programs, C]."""
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


@dataclass(frozen=True)
class RowConfig:
    """Tile [rows, block_c] of a program and its warps."""

    rows: int
    block_c: int
    num_warps: int

    def arguments(self) -> dict[str, int]:
        """As a launch takes them. Fusion of multiply and add is said out loud: Triton's default is going to change."""
        return {
            "ROWS": self.rows,
            "BLOCK_C": self.block_c,
            "num_warps": self.num_warps,
            "enable_fp_fusion": True,
        }


def choose_rows(
    samples: int,
    channels: int,
    pixels: int,
    itemsize: int,
    channels_last: bool,
    processors: int,
    elements: int,
) -> RowConfig:
    """The tile for [samples, channels, pixels]; nothing is tried out at run time.

    Args:
        samples, channels, pixels: sizes.
        itemsize: bytes an element.
        channels_last: the memory order.
        processors: the device's multiprocessors; small inputs are cut finer, so that each has work.
        elements: of a tile of four warps; a tile is up to four times larger where that many channels need it.
    """
    block_c = triton.next_power_of_2(channels)
    narrowest = 1 if channels_last else max(1, min(SECTOR // itemsize, 4 * elements // block_c))
    rows = min(max(elements // block_c, narrowest), triton.next_power_of_2(pixels))
    while rows > narrowest and samples * -(-pixels // rows) < 2 * processors:
        rows //= 2
    return RowConfig(rows, block_c, min(max(4 * rows * block_c // elements, 1), 16))


def accumulator(x: Tensor) -> Any:
    """The type of the maths, as Triton calls it."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def processors(device: torch.device) -> int:
    """Multiprocessors; Triton's interpreter counts as two."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Launch where `x` lives."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _arguments(
    x: Tensor, bias: Tensor | None, eps: float, norm: str, act: str, elements: int
) -> tuple[int, dict[str, Any]]:
    """Number of tiles and the arguments that both kernels share. With channels last a batch is one long image."""
    samples, channels, pixels = x.shape[0], x.shape[1], x[0, 0].numel()
    channels_last = is_channels_last(x)
    if channels_last:
        samples, pixels = 1, samples * pixels
    config = choose_rows(
        samples, channels, pixels, x.element_size(), channels_last, processors(x.device), elements
    )
    kind = {
        "LAYER": norm == "layer",
        "SILU": act == "silu",
        "BIAS": bias is not None,
        "EPS": eps,
        "ACC": accumulator(x),
    }
    sizes = {"HW": pixels, "C": channels, "NHWC": channels_last}
    return samples * -(-pixels // config.rows), {**sizes, **kind, **config.arguments()}


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
        tiles, arguments = _arguments(x, bias, eps, norm, act, FORWARD)
        with on_device(x):
            row_norm_act_forward[(tiles,)](x, weight, x if bias is None else bias, y, **arguments)
    return y


def launch_backward(
    dy: Tensor,  # in the order of x
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm: str,
    act: str,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x; dweight and dbias [C] in the precision of the maths, empty where not asked for."""
    dx = torch.empty_like(x)
    acc = torch.promote_types(x.dtype, torch.float32)
    width = x.shape[1] if parameters else 0
    if not x.numel():
        return dx, x.new_zeros(width, dtype=acc), x.new_zeros(width if bias is not None else 0, dtype=acc)
    tiles, arguments = _arguments(x, bias, eps, norm, act, BACKWARD)
    arguments |= {"tiles": tiles, "PARAMETERS": parameters}
    programs = min(tiles, processors(x.device) * max(WARPS // arguments["num_warps"], 1))
    dweight = x.new_empty((programs, width), dtype=acc)
    dbias = x.new_empty((programs, width if bias is not None else 0), dtype=acc)
    with on_device(x):
        row_norm_act_backward[(programs,)](
            dy, x, weight, x if bias is None else bias, dx, dweight, dbias, **arguments
        )
    return dx, dweight.sum(0), dbias.sum(0)


def plans() -> list[Plan]:
    """What is compiled ahead of time: both kernels at the sizes of 256-pixel activations on an H100, and the widest row."""
    from .aot import Plan

    found = []
    for itemsize, dtype in ((2, "bf16"), (4, "fp32")):
        for channels, channels_last in ((96, True), (128, True), (512, True), (4096, True), (128, False)):
            pixels = 256 * 256 if channels <= 512 else 256
            for kernel, elements, only in (
                (row_norm_act_forward, FORWARD, {"y_ptr": f"*{dtype}"}),
                (row_norm_act_backward, BACKWARD, {"dy_ptr": f"*{dtype}", "dx_ptr": f"*{dtype}"}),
            ):
                config = choose_rows(1, channels, pixels, itemsize, channels_last, 132, elements)
                constants = {
                    "C": channels,
                    "NHWC": channels_last,
                    "EPS": 1e-6,
                    "LAYER": True,
                    "SILU": True,
                    "BIAS": True,
                }
                constants |= {"ACC": tl.float32, "ROWS": config.rows, "BLOCK_C": config.block_c}
                pointers = {"x_ptr": f"*{dtype}", "weight_ptr": "*fp32", "bias_ptr": "*fp32", **only}
                numbers = {"HW": "i32"}
                if kernel is row_norm_act_backward:
                    constants |= {"PARAMETERS": True}
                    pointers |= {"dweight_ptr": "*fp32", "dbias_ptr": "*fp32"}
                    numbers |= {"tiles": "i32"}
                direction = "forward" if kernel is row_norm_act_forward else "backward"
                name = f"row_norm_act/{direction} {'nhwc' if channels_last else 'nchw'} {dtype} C={channels}"
                signature = pointers | numbers | dict.fromkeys(constants, "constexpr")
                registers = 128 if channels <= 512 else 160
                found.append(
                    Plan(name, kernel, signature, constants, (*pointers, "HW"), config.num_warps, registers)
                )
    return found

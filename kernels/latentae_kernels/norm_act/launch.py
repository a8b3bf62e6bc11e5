"""Launches and tile sizes of `norm_act`'s kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..launcher import Plan, accumulator, launch, processors, recorded_launches
from ..tensors import compute_dtype, is_channels_last
from . import kernels

__all__ = ["Config", "Problem", "choose_config", "launch_apply", "launch_backward", "launch_forward", "plans"]

TILE = {False: 2048, True: 1024}  # elements per tensor in a two-pass tile of 4 warps, forward and backward
WAVES = 16  # programs per multiprocessor that the two-pass kernels aim for
RESIDENT = {False: 16384, True: 8192}  # elements that one program can keep in registers, forward and backward
SECTOR = 32  # bytes of a memory transaction; narrower rows of channels waste bandwidth


@dataclass(frozen=True)
class Problem:
    """What the configuration depends on: sizes, bytes per element, memory format."""

    n: int
    c: int
    hw: int
    groups: int
    itemsize: int
    channels_last: bool


@dataclass(frozen=True)
class Config:
    """Tile [block_hw, block_c], pixels per program, groups per program (0: more than one tile)."""

    block_hw: int
    block_c: int
    chunk: int
    num_warps: int
    resident_groups: int = 0


def choose_config(problem: Problem, processors: int, backward: bool) -> Config:
    """The configuration for a device with `processors` multiprocessors, without autotuning."""
    return _resident(problem, processors, backward) or _two_pass(problem, processors, backward)


def _resident(p: Problem, processors: int, backward: bool) -> Config | None:
    """Complete groups per program, if they fit registers and occupy all processors."""
    width = p.c // p.groups
    wanted = -(-SECTOR // p.itemsize) if p.channels_last else 1
    fits = [k for k in range(1, p.groups + 1) if p.groups % k == 0]
    groups = next((k for k in fits if k * width >= wanted), fits[-1])
    block_hw, block_c = triton.next_power_of_2(p.hw), triton.next_power_of_2(groups * width)
    elements = block_hw * block_c
    if elements > RESIDENT[backward] or block_c > 128 or 2 * p.n * p.groups // groups < processors:
        return None
    per_warp = 512 if backward else 1024
    return Config(block_hw, block_c, p.hw, max(elements // per_warp, 1), groups)


def _two_pass(p: Problem, processors: int, backward: bool) -> Config:
    tile, pixels, channels = TILE[backward], triton.next_power_of_2(p.hw), triton.next_power_of_2(p.c)
    if p.channels_last:
        block_c = min((64, 32), key=lambda block: (-(-p.c // block) * block, -block))
        block_c = min(block_c, channels)
        block_hw = min(tile // block_c, pixels)
    else:
        block_hw = min(tile, pixels)
        block_c = min(tile // block_hw, channels)
    tiles = -(-p.c // block_c) * p.n * -(-p.hw // block_hw)
    steps = max(1, min(tiles // (processors * WAVES), 32))
    warps = min(max(block_hw * block_c * 4 // tile, 1), 4)
    return Config(block_hw, block_c, steps * block_hw, warps)


def launch_forward(
    x: Tensor,  # [N, C, *spatial], dense
    residual: Tensor | None,  # like x
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    pre_bias: Tensor | None,  # [C]
    groups: int,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and sum like x (sum empty without a residual), mean and 1/std [N, groups]."""
    y, total = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=compute_dtype(x)) for _ in range(2))
    if not x.numel():
        return y, total, mean.zero_(), rstd.fill_(eps**-0.5)
    settings = _settings(x, groups, act, pre_bias, backward=False)
    settings |= {"RESIDUAL": residual is not None, "EPS": eps}
    other, shift = x if residual is None else residual, x if pre_bias is None else pre_bias
    if settings["GROUPS"]:
        tensors = (x, other, shift, weight, bias, total, y, mean, rstd)
        launch(kernels.resident_forward, _groups_grid(settings), tensors, settings)
        return y, total, mean, rstd
    chunks = x.new_empty((2, x.shape[0], settings["chunks"], x.shape[1]), dtype=compute_dtype(x)).unbind(0)
    launch(kernels.chunk_statistics, _tiles_grid(settings), (x, other, shift, total, *chunks), settings)
    launch(kernels.merge_statistics, _groups_grid(settings), (*chunks, mean, rstd), _merging(settings))
    if residual is not None:  # the sum already contains pre_bias
        x, shift, settings["PRE_BIAS"] = total, total, False
    launch(kernels.apply, _tiles_grid(settings), (x, shift, weight, bias, mean, rstd, y), settings)
    return y, total, mean, rstd


def launch_apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pre_bias: Tensor | None,
    mean: Tensor,  # [N, groups]
    rstd: Tensor,  # [N, groups]
    groups: int,
    act: str,
) -> Tensor:
    """y from x and known statistics."""
    y = torch.empty_like(x)
    if x.numel():
        settings = _settings(x, groups, act, pre_bias, backward=False, two_pass=True)
        shift = x if pre_bias is None else pre_bias
        launch(kernels.apply, _tiles_grid(settings), (x, shift, weight, bias, mean, rstd, y), settings)
    return y


def launch_backward(
    dy: Tensor,  # in the format of x
    dtotal: Tensor | None,  # in the format of x
    x: Tensor,  # what was normalized: the op's x, or the sum with a residual
    weight: Tensor,
    bias: Tensor,
    pre_bias: Tensor | None,  # None where x is the sum
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    act: str,
    sum_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx like x; dweight, dbias and the sum of dx per channel [C], in the compute dtype."""
    samples, channels = x.shape[:2]
    dx, acc = torch.empty_like(x), compute_dtype(x)
    if not x.numel():
        dweight, dbias, dpre_bias = (x.new_zeros(channels, dtype=acc) for _ in range(3))
        return dx, dweight, dbias, dpre_bias
    settings = _settings(x, groups, act, pre_bias, backward=True)
    settings |= {"DTOTAL": dtotal is not None, "SUM": sum_dx}
    sums = x.new_empty((samples, 3, channels), dtype=acc)
    inputs = (x, x if pre_bias is None else pre_bias, weight, bias, mean, rstd)
    extra = x if dtotal is None else dtotal
    if settings["GROUPS"]:
        tensors = (dy, extra, *inputs, dx, sums)
        launch(kernels.resident_backward, _groups_grid(settings), tensors, settings)
    else:
        chunks = x.new_empty((3, samples, settings["chunks"], channels), dtype=acc).unbind(0)
        a, b = x.new_empty((2, samples, groups), dtype=acc).unbind(0)
        launch(kernels.chunk_gradients, _tiles_grid(settings), (dy, *inputs, *chunks[:2]), settings)
        tensors = (*chunks[:2], weight, sums, a, b)
        launch(kernels.merge_gradients, _groups_grid(settings), tensors, _merging(settings))
        tensors = (dy, extra, *inputs, a, b, dx, chunks[2])
        launch(kernels.input_gradient, _tiles_grid(settings), tensors, settings)
        torch.sum(chunks[2], 1, out=sums[:, 2]) if sum_dx else sums[:, 2].zero_()
    # one writer and a fixed order: the sums are the same in every run; copies, because an op's
    # results share no memory
    dweight, dbias, dpre_bias = sums.sum(0)
    return dx, dweight.clone(), dbias.clone(), dpre_bias.clone()


def _settings(
    x: Tensor, groups: int, act: str, pre_bias: Tensor | None, backward: bool, two_pass: bool = False
) -> dict[str, Any]:
    """The arguments of all kernels that are not tensors."""
    (samples, channels), hw, channels_last = x.shape[:2], x.shape[2:].numel(), is_channels_last(x)
    problem = Problem(samples, channels, hw, groups, x.element_size(), channels_last)
    choose = _two_pass if two_pass else choose_config
    config = choose(problem, processors(x.device), backward)
    sizes = {"N": samples, "HW": hw, "chunks": -(-hw // config.chunk), "CHUNK": config.chunk, "C": channels}
    modes = {"G": groups, "GROUPS": config.resident_groups, "NHWC": channels_last, "ACC": accumulator(x)}
    modes |= {"PRE_BIAS": pre_bias is not None, "SILU": act == "silu"}
    tile = {"BLOCK_HW": config.block_hw, "BLOCK_C": config.block_c, "num_warps": config.num_warps}
    return sizes | modes | tile


def _tiles_grid(settings: dict[str, Any]) -> tuple[int, int]:
    return settings["N"] * settings["chunks"], -(-settings["C"] // settings["BLOCK_C"])


def _groups_grid(settings: dict[str, Any]) -> tuple[int]:
    return (settings["N"] * settings["G"] // (settings["GROUPS"] or 1),)


def _merging(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the kernels that merge chunks: a tile of chunks by a group's channels."""
    block_c = triton.next_power_of_2(settings["C"] // settings["G"])
    block_k = max(1, min(2048 // block_c, triton.next_power_of_2(settings["chunks"])))
    warps = min(max(block_k * block_c // 256, 1), 4)  # more elements per warp spill on sm_80
    return settings | {"BLOCK_K": block_k, "BLOCK_C": block_c, "num_warps": warps}


def plans() -> list[Plan]:
    """Every kernel at the widths of the shipped autoencoders, in half and single precision."""
    shapes = [(128, 256, True), (96, 256, True), (320, 64, True), (512, 64, True), (128, 256, False)]
    found: dict[str, Plan] = {}
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for channels, side, channels_last in (*shapes, (512, 32, True), (512, 16, True)):
            for kernel, arguments in _recorded(channels, side, channels_last, dtype):
                if side < 64 and not kernel.__name__.startswith("resident"):
                    continue
                order = "nhwc" if channels_last else "nchw"
                name = f"norm_act/{kernel.__name__} {order} {label} C={channels} HW={side * side}"
                registers = 96 if kernel is kernels.apply else 128
                wide_loads = not kernel.__name__.startswith("merge")
                found[name] = Plan(name, kernel, arguments, registers, wide_loads=wide_loads)
    return list(found.values())


def _recorded(
    channels: int, side: int, channels_last: bool, dtype: torch.dtype
) -> list[tuple[Any, dict[str, Any]]]:
    """The launches of both passes for 8 samples, with every option on."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(8, channels, side, side, dtype=dtype, device="meta", memory_format=layout)
    vector, statistics = x.new_empty(channels, dtype=torch.float32), x.new_empty(8, 32, dtype=torch.float32)
    with recorded_launches() as launches:
        launch_forward(x, x, vector, vector, vector, 32, 1e-6, "silu")
        launch_apply(x, vector, vector, vector, statistics, statistics, 32, "silu")
        launch_backward(x, x, x, vector, vector, vector, statistics, statistics, 32, "silu", True)
    return launches

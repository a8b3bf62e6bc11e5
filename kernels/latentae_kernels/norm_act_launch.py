"""Launchers of `norm_act`'s kernels, and the choice of their configuration."""

# pyright: reportArgumentType=false
# (Triton types the constant parameters of a kernel as constexpr, which plain numbers are not)

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import norm_act_kernels as kernels
from .layout import is_channels_last

__all__ = ["Config", "Problem", "choose_config", "launch_apply", "launch_backward", "launch_forward"]

TILE = {
    False: 2048,
    True: 1024,
}  # elements of each tensor that a two-pass program of 4 warps holds at a time, forward and backward
WAVES = 16  # programs per multiprocessor that the two-pass kernels aim for
RESIDENT = {False: 16384, True: 8192}  # elements that one program can keep in registers, forward and backward
OPTIONS = {
    "enable_fp_fusion": True
}  # multiply-add in one rounding; Triton 3.9 warns where a launch leaves it open
SECTOR = 32  # bytes a memory transaction moves; narrower rows of channels waste bandwidth


@dataclass(frozen=True)
class Problem:
    """What the configuration depends on: sizes, bytes per element, memory order."""

    n: int
    c: int
    hw: int
    groups: int
    itemsize: int
    channels_last: bool


@dataclass(frozen=True)
class Config:
    """Tile [block_hw, block_c] and `chunk` pixels a program; `resident_groups` groups a program where all their pixels fit one tile."""

    block_hw: int
    block_c: int
    chunk: int
    num_warps: int
    resident_groups: int = 0


def choose_config(problem: Problem, processors: int, backward: bool) -> Config:
    """The configuration for one problem on a device with that many multiprocessors; nothing is tried out at run time."""
    return _resident(problem, processors, backward) or _two_pass(problem, processors, backward)


def _resident(p: Problem, processors: int, backward: bool) -> Config | None:
    """One program for whole groups, if their pixels fit into registers and there are groups enough to keep the device busy."""
    width = p.c // p.groups
    wanted = -(-SECTOR // p.itemsize) if p.channels_last else 1
    fits = [k for k in range(1, p.groups + 1) if p.groups % k == 0]
    groups = next((k for k in fits if k * width >= wanted), fits[-1])
    block_hw, block_c = triton.next_power_of_2(max(p.hw, 1)), triton.next_power_of_2(groups * width)
    elements = block_hw * block_c
    if elements > RESIDENT[backward] or block_c > 128 or 2 * p.n * p.groups // groups < processors:
        return None
    per_warp = 512 if backward else 1024
    return Config(block_hw, block_c, p.hw, max(elements // per_warp, 1), groups)


def _two_pass(p: Problem, processors: int, backward: bool) -> Config:
    tile = TILE[backward]
    if p.channels_last:
        block_c = min((64, 32), key=lambda block: (-(-p.c // block) * block, -block))
        block_c = min(block_c, triton.next_power_of_2(p.c))
        block_hw = min(tile // block_c, triton.next_power_of_2(max(p.hw, 1)))
    else:
        block_hw = min(tile, triton.next_power_of_2(max(p.hw, 1)))
        block_c = min(tile // block_hw, triton.next_power_of_2(p.c))
    tiles = -(-p.c // block_c) * p.n * -(-p.hw // block_hw)
    steps = max(1, min(tiles // (processors * WAVES), 32))
    warps = min(max(block_hw * block_c * 4 // tile, 1), 4)
    return Config(block_hw, block_c, steps * block_hw, warps)


class _Launch:
    """One call: the tensor that decides sizes and order, the configuration, and the arguments that the kernels share."""

    def __init__(
        self, x: Tensor, groups: int, act: str, pre_bias: Tensor | None, backward: bool, config: Config | None
    ) -> None:
        n, c, *spatial = x.shape
        self.n, self.c, self.hw, self.groups = n, c, torch.Size(spatial).numel(), groups
        self.x = x
        self.channels_last = is_channels_last(x)
        self.acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        problem = Problem(n, c, self.hw, groups, x.element_size(), self.channels_last)
        self.config = config or choose_config(problem, _processors(x.device), backward)
        self.chunks = -(-self.hw // self.config.chunk)
        self.pre_bias = x if pre_bias is None else pre_bias  # a pointer that is never read
        acc = triton.language.float64 if x.dtype == torch.float64 else triton.language.float32
        self.tiles = (n * self.chunks, -(-c // self.config.block_c))
        self.size: dict[str, Any] = {"HW": self.hw, "chunks": self.chunks, "CHUNK": self.config.chunk}
        self.block: dict[str, Any] = {
            "BLOCK_HW": self.config.block_hw,
            "BLOCK_C": self.config.block_c,
            "num_warps": self.config.num_warps,
        }
        self.kind: dict[str, Any] = {"C": c, "ACC": acc}
        self.mode: dict[str, Any] = {
            "G": groups,
            "NHWC": self.channels_last,
            "PRE_BIAS": pre_bias is not None,
            "SILU": act == "silu",
        }

    @property
    def empty(self) -> bool:
        return self.x.numel() == 0

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.acc, device=self.x.device)

    def merge_block(self) -> dict[str, Any]:
        block_c = triton.next_power_of_2(self.c // self.groups)
        block_k = max(1, min(2048 // block_c, triton.next_power_of_2(max(self.chunks, 1))))
        return {
            "BLOCK_K": block_k,
            "BLOCK_C": block_c,
            "num_warps": min(max(block_k * block_c // 512, 1), 4),
            **OPTIONS,
        }

    def resident(self) -> tuple[tuple[int], dict[str, Any]]:
        """Grid and arguments of the kernels that keep groups in registers."""
        groups = self.config.resident_groups
        return (self.n * self.groups // groups,), {
            "HW": self.hw,
            **self.kind,
            **self.mode,
            "GROUPS": groups,
            **self.block,
        }


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch_forward(
    x: Tensor,  # [N, C, *spatial], dense
    residual: Tensor | None,  # like x
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    pre_bias: Tensor | None,  # [C]
    groups: int,
    eps: float,
    act: str,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and the sum (both like x; the sum is empty without a residual), mean and 1/std [N, groups]."""
    call = _Launch(x, groups, act, pre_bias, False, config)
    y, mean, rstd = torch.empty_like(x), call.new(call.n, groups), call.new(call.n, groups)
    total = torch.empty_like(x) if residual is not None else x.new_empty(0)
    if call.empty:
        return y, total, mean.zero_(), rstd.fill_(eps**-0.5)
    other = x if residual is None else residual
    with _on(x.device):
        if call.config.resident_groups:
            grid, arguments = call.resident()
            kernels.resident_forward[grid](
                x, other, call.pre_bias, weight, bias, total, y, mean, rstd, RESIDUAL=residual is not None, EPS=eps, **arguments,
            )  # fmt: skip
            return y, total, mean, rstd
        chunk_mean, chunk_m2 = call.new(2, call.n, call.chunks, call.c).unbind(0)
        kernels.chunk_statistics[call.tiles](
            x, other, call.pre_bias, total, chunk_mean, chunk_m2, **call.size, **call.kind, NHWC=call.channels_last,
            PRE_BIAS=pre_bias is not None, RESIDUAL=residual is not None, **call.block,
        )  # fmt: skip
        kernels.merge_statistics[(call.n * groups,)](
            chunk_mean,
            chunk_m2,
            mean,
            rstd,
            **call.size,
            **call.kind,
            G=groups,
            EPS=eps,
            **call.merge_block(),
        )
    if residual is None:
        launch_apply(x, weight, bias, pre_bias, mean, rstd, groups, act, call.config, y)
    else:  # the sum already holds the bias
        launch_apply(total, weight, bias, None, mean, rstd, groups, act, call.config, y)
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
    config: Config | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y from x and known statistics, always by the tiled kernel."""
    if config is None or config.resident_groups:
        n, c, *spatial = x.shape
        problem = Problem(n, c, torch.Size(spatial).numel(), groups, x.element_size(), is_channels_last(x))
        config = _two_pass(problem, _processors(x.device), False)
    call = _Launch(x, groups, act, pre_bias, False, config)
    y = torch.empty_like(x) if out is None else out
    if not call.empty:
        with _on(x.device):
            kernels.apply[call.tiles](
                x, call.pre_bias, weight, bias, mean, rstd, y, **call.size, **call.kind, **call.mode, **call.block,
            )  # fmt: skip
    return y


def launch_backward(
    dy: Tensor,  # in the order of x
    dtotal: Tensor | None,  # in the order of x
    x: Tensor,  # what was normalized: the op's x, or the sum where there was a residual
    weight: Tensor,
    bias: Tensor,
    pre_bias: Tensor | None,  # None where x is the sum
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    act: str,
    sum_dx: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx like x; dweight, dbias and the sum of dx over samples and pixels [C], in the precision of the maths."""
    call = _Launch(x, groups, act, pre_bias, True, config)
    dx = torch.empty_like(x)
    if call.empty:
        return dx, call.new(call.c).zero_(), call.new(call.c).zero_(), call.new(call.c).zero_()
    extra = x if dtotal is None else dtotal
    sums = call.new(call.n, 3, call.c)
    with _on(x.device):
        if call.config.resident_groups:
            grid, arguments = call.resident()
            kernels.resident_backward[grid](
                dy, extra, x, call.pre_bias, weight, bias, mean, rstd, dx, sums, DTOTAL=dtotal is not None, **arguments,
            )  # fmt: skip
            return dx, *_columns(sums)
        chunk_s1, chunk_s2, chunk_dx = call.new(3, call.n, call.chunks, call.c).unbind(0)
        a, b = call.new(2, call.n, groups).unbind(0)
        kernels.chunk_gradients[call.tiles](
            dy,
            x,
            call.pre_bias,
            weight,
            bias,
            mean,
            rstd,
            chunk_s1,
            chunk_s2,
            **call.size,
            **call.kind,
            **call.mode,
            **call.block,
        )
        kernels.merge_gradients[(call.n * groups,)](
            chunk_s1,
            chunk_s2,
            weight,
            sums,
            a,
            b,
            HW=call.hw,
            chunks=call.chunks,
            **call.kind,
            G=groups,
            **call.merge_block(),
        )
        kernels.input_gradient[call.tiles](
            dy, extra, x, call.pre_bias, weight, bias, mean, rstd, a, b, dx, chunk_dx, **call.size, **call.kind, **call.mode,
            DTOTAL=dtotal is not None, SUM=sum_dx, **call.block,
        )  # fmt: skip
    dweight, dbias, _ = _columns(sums)
    return dx, dweight, dbias, chunk_dx.sum((0, 1)) if sum_dx else dbias.new_zeros(call.c)


def _columns(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, 3, C] -> three independent [C]; one writer and a fixed order make the sum the same in every run."""
    dweight, dbias, dx = sums.sum(0)
    return dweight.clone(), dbias.clone(), dx.clone()

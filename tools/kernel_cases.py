"""What tools/bench_kernels.py times: each op in its modes, the shapes, plain torch beside it, and the bytes it can't avoid moving.

Shapes are those of the models the ops serve, on 256x256 images in batches of eight. Bytes count one activation element of the largest
tensor in bf16 and are those of kernels/README.md: what eager kernels move, what a kernel for the statistics and one for the rest move,
and what is left if everything stays on the chip between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from latentae_kernels import Norm, lpips_head, norm_act, norm_act_conv2d, row_norm_act, upsample_conv2d
from torch import Tensor

__all__ = ["Bytes", "Case", "cases"]

GROUPS = 32
H100_PROCESSORS = 132
Shape = tuple[int, int, int, int]  # of the input: batch, channels, height, width

# levels of the f8 autoencoder (kl-f8)
F8: list[Shape] = [(8, 128, 256, 256), (8, 256, 128, 128), (8, 512, 64, 64), (8, 512, 32, 32)]
# levels of a deep-compression autoencoder (DC-AE), which normalizes over the channels of each pixel
DEEP: list[Shape] = [(8, 256, 128, 128), (8, 512, 64, 64), (8, 512, 32, 32), (8, 1024, 16, 16)]
# VGG16's five feature maps
VGG: list[Shape] = [
    (8, 64, 256, 256),
    (8, 128, 128, 128),
    (8, 256, 64, 64),
    (8, 512, 32, 32),
    (8, 512, 16, 16),
]
# inputs of the f8 decoder's three upsamplings
UP: list[Shape] = [(8, 512, 32, 32), (8, 512, 64, 64), (8, 256, 128, 128)]


@dataclass(frozen=True)
class Bytes:
    """Bytes an element of bf16 costs: in eager kernels (None where nobody counted), in two passes, in one."""

    eager: int | None
    two_pass: int
    one_pass: int


@dataclass(frozen=True)
class Case:
    """One op in one mode on one shape."""

    op: str
    mode: str
    shape: Shape
    backward: bool
    bytes: Bytes
    inputs: Callable[[Shape], tuple[Tensor, ...]]  # fp32 on the CPU, NCHW
    plain: Callable[..., Any]
    ours: Callable[..., Any]
    kernels: Callable[[Case], tuple[str, ...]]  # which kernels run, as the ahead-of-time report names them
    differentiable: tuple[int, ...]  # inputs whose gradient a backward pass computes
    flops: int = 0  # per element, where arithmetic and not memory may be the floor

    @property
    def name(self) -> str:
        """ "norm_act forward, bias 8x128x256x256"."""
        return f"{self.op} {self.mode} {'x'.join(map(str, self.shape))}"

    @property
    def elements(self) -> int:
        """Elements of the input, which bytes and operations are counted by."""
        return prod(self.shape)

    def shrunk(self, batch: int | None, by: int) -> Case:
        """The same case with another batch size and sides divided by `by`."""
        n, c, h, w = self.shape
        return replace(self, shape=(batch or n, c, max(h // by, 1), max(w // by, 1)))


def cases() -> list[Case]:
    """Every case, in the order of the tables."""
    return [*_norm_act(), *_norm_act_conv2d(), *_row_norm_act(), *_lpips_head(), *_upsample()]


def _vectors(count: int, channels: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(count, channels).unbind(0))


def _pair(
    op: str, mode: str, shape: Shape, forward: Bytes, backward: Bytes, flops: int = 0, **common: Any
) -> list[Case]:
    """A case for the forward pass and one for the backward pass, which takes twice the arithmetic."""
    label = f", {mode}" if mode else ""
    return [
        Case(op, f"forward{label}", shape, False, forward, flops=flops, **common),
        Case(op, f"backward{label}", shape, True, backward, flops=2 * flops, **common),
    ]


def _norm_act() -> list[Case]:
    # mode, forward, backward, how many of (x, weight, bias, pre_bias, residual), activation
    modes = [
        ("", Bytes(10, 6, 4), Bytes(16, 10, 6), 3, "silu"),
        ("bias", Bytes(14, 6, 4), Bytes(18, 10, 6), 4, "silu"),
        ("bias + residual", Bytes(20, 10, 8), Bytes(24, 12, 8), 5, "silu"),
        ("identity", Bytes(6, 6, 4), Bytes(10, 10, 6), 3, "identity"),
    ]
    found = []
    for shape in F8:
        for mode, forward, backward, count, act in modes:
            if (
                act == "identity" and shape[3] > 32
            ):  # only the attention of the lowest level goes without an activation
                continue
            functions = {
                "inputs": _norm_act_inputs(count),
                "plain": _group_norm(act),
                "ours": _fused_group_norm(act),
            }
            common = {"differentiable": tuple(range(count)), "kernels": _norm_act_kernels, **functions}
            found += _pair("norm_act", mode, shape, forward, backward, **common)
    return found


def _norm_act_kernels(case: Case) -> tuple[str, ...]:
    from latentae_kernels.norm_act.launch import Problem, choose_config

    n, c, h, w = case.shape
    if choose_config(Problem(n, c, h * w, GROUPS, 2, True), H100_PROCESSORS, case.backward).resident_groups:
        return ("norm_act/resident_backward",) if case.backward else ("norm_act/resident_forward",)
    if case.backward:
        return "norm_act/chunk_gradients", "norm_act/merge_gradients", "norm_act/input_gradient"
    return "norm_act/chunk_statistics", "norm_act/merge_statistics", "norm_act/apply"


def _norm_act_inputs(count: int) -> Callable[[Shape], tuple[Tensor, ...]]:
    """x, weight, bias, and as `count` has it pre_bias and residual."""

    def inputs(shape: Shape) -> tuple[Tensor, ...]:
        return (torch.randn(shape), *_vectors(3, shape[1]), torch.randn(shape))[:count]

    return inputs


def _group_norm(act: str) -> Callable[..., Any]:
    def plain(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        pre_bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Any:
        if pre_bias is not None:
            x = x + pre_bias.view(1, -1, 1, 1)
        if residual is not None:
            x = x + residual
        y = F.group_norm(x, GROUPS, weight, bias, 1e-6)
        y = F.silu(y) if act == "silu" else y
        return y if residual is None else (y, x)

    return plain


def _fused_group_norm(act: Any) -> Callable[..., Any]:
    def ours(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        pre_bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Any:
        return norm_act(x, weight, bias, GROUPS, act=act, pre_bias=pre_bias, residual=residual)

    return ours


def _norm_act_conv2d() -> list[Case]:
    def plain(x: Tensor, weight: Tensor, bias: Tensor, conv_weight: Tensor) -> Tensor:
        return F.conv2d(F.silu(F.group_norm(x, GROUPS, weight, bias, 1e-6)), conv_weight, padding=1)

    def inputs(shape: Shape) -> tuple[Tensor, ...]:
        c = shape[1]
        return torch.randn(shape), *_vectors(2, c), torch.randn(c, c, 3, 3) * (9 * c) ** -0.5

    def ours(x: Tensor, weight: Tensor, bias: Tensor, conv_weight: Tensor) -> Tensor:
        return norm_act_conv2d(x, Norm(weight, bias, GROUPS), conv_weight, padding=1)

    def kernels(
        case: Case,
    ) -> tuple[str, ...]:  # and cuDNN's; the backward pass computes the activation again
        return _norm_act_kernels(case) + (("norm_act/apply",) if case.backward else ())

    # norm_act's bytes, and 4 for the convolution's input and output; backwards its 8 for two passes, and 4 to compute y again
    forward, backward = Bytes(14, 10, 8), Bytes(24, 22, 18)
    common = {
        "plain": plain,
        "inputs": inputs,
        "ours": ours,
        "differentiable": (0, 1, 2, 3),
        "kernels": kernels,
    }
    found = []
    for shape in F8[:3]:
        found += _pair("norm_act_conv2d", "", shape, forward, backward, flops=18 * shape[1], **common)
    return found


def _row_norm_act() -> list[Case]:
    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.rms_norm(x.movedim(1, -1), (x.shape[1],), weight, 1e-6) + bias).movedim(-1, 1)

    def inputs(shape: Shape) -> tuple[Tensor, ...]:
        return (torch.randn(shape), *_vectors(2, shape[1]))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return row_norm_act(x, weight, bias)

    common = {"plain": plain, "inputs": inputs, "ours": ours, "differentiable": (0, 1, 2)}
    common["kernels"] = lambda case: (f"row_norm_act/{'backward' if case.backward else 'forward'}",)
    return [
        case
        for shape in DEEP
        for case in _pair("row_norm_act", "", shape, Bytes(None, 4, 4), Bytes(None, 6, 6), **common)
    ]


def _lpips_head() -> list[Case]:
    def unit(x: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().sum(dim=1, keepdim=True) + 1e-10)

    def plain(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d((unit(a) - unit(b)).square(), weight.view(1, -1, 1, 1)).mean((1, 2, 3))

    def inputs(shape: Shape) -> tuple[Tensor, ...]:
        return torch.randn(shape), torch.randn(shape), torch.rand(shape[1])

    def ours(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return lpips_head(a, b, weight)

    # in training only the reconstruction's features, the first, have a gradient
    common = {"plain": plain, "inputs": inputs, "ours": ours, "differentiable": (0,)}
    common["kernels"] = lambda case: (f"lpips_head/{'backward da' if case.backward else 'forward'}",)
    return [
        case
        for shape in VGG
        for case in _pair("lpips_head", "", shape, Bytes(None, 4, 4), Bytes(None, 6, 6), **common)
    ]


def _upsample() -> list[Case]:
    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)

    def inputs(shape: Shape) -> tuple[Tensor, ...]:
        c = shape[1]
        return torch.randn(shape), torch.randn(c, c, 3, 3) * (9 * c) ** -0.5, torch.randn(c)

    def ours(
        x: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:  # on a GPU "auto" is the plain form until "folded" is measured there
        return upsample_conv2d(x, weight, bias, method="folded" if x.is_cuda else "auto")

    common = {"plain": plain, "inputs": inputs, "ours": ours, "differentiable": (0, 1, 2)}
    common["kernels"] = lambda case: ()  # cuDNN's
    found = []
    for shape in UP:
        # 16 products and sums for each pair of channels and input pixel; x and four outputs, then dy twice, x and dx
        found += _pair(
            "upsample_conv2d",
            "",
            shape,
            Bytes(None, 10, 10),
            Bytes(None, 20, 20),
            flops=32 * shape[1],
            **common,
        )
    return found

"""Cases of tools/bench_kernels.py: each op in its modes and shapes, plain torch, and the bytes that
must move.

Shapes are those of the models that use the ops, for 256x256 images in batches of eight. Bytes are
per element of the largest tensor in bf16, as in kernels/README.md: moved by eager kernels, by a
kernel for the statistics and one for the rest (two passes), and if everything stays on the chip
between the two (one pass).
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


def _levels(*levels: tuple[int, int]) -> list[Shape]:
    """Shapes of square images, from (channels, side)."""
    return [(8, channels, side, side) for channels, side in levels]


F8 = _levels((128, 256), (256, 128), (512, 64), (512, 32))  # levels of the f8 autoencoder (kl-f8)
# levels of a deep-compression autoencoder (DC-AE), which normalizes over the channels of each pixel
DEEP = _levels((256, 128), (512, 64), (512, 32), (1024, 16))
VGG = _levels((64, 256), (128, 128), (256, 64), (512, 32), (512, 16))  # VGG16's five feature maps
UP = _levels((512, 32), (512, 64), (256, 128))  # inputs of the f8 decoder's three upsamplings


@dataclass(frozen=True)
class Bytes:
    """Bytes per bf16 element: in eager kernels (None if not counted), in two passes, in one."""

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
    kernels: Callable[[Case], tuple[str, ...]]  # kernels that run, as named in the ahead-of-time report
    differentiable: tuple[int, ...]  # inputs whose gradient a backward pass computes
    flops: int = 0  # per element, where arithmetic and not memory may be the floor

    @property
    def name(self) -> str:
        """ "norm_act forward, bias 8x128x256x256"."""
        return f"{self.op} {self.mode} {'x'.join(map(str, self.shape))}"

    @property
    def elements(self) -> int:
        """Elements of the input; bytes and operations are per element."""
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


def _conv_weight(channels: int) -> Tensor:
    return torch.randn(channels, channels, 3, 3) * (9 * channels) ** -0.5


def _pair(
    op: str, mode: str, shape: Shape, forward: Bytes, backward: Bytes, flops: int = 0, **common: Any
) -> list[Case]:
    """A case for the forward pass and one for the backward pass (twice the arithmetic)."""
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
            if act == "identity" and shape[3] > 32:  # only the lowest level's attention has no activation
                continue
            common: dict[str, Any] = {"inputs": _norm_act_inputs(count), "plain": _plain_norm_act(act)}
            common |= {"ours": _our_norm_act(act), "kernels": _norm_act_kernels}
            differentiable = tuple(range(count))
            found += _pair(
                "norm_act", mode, shape, forward, backward, differentiable=differentiable, **common
            )
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
    """The first `count` of x, weight, bias, pre_bias and residual."""

    def inputs(shape: Shape) -> tuple[Tensor, ...]:
        return (torch.randn(shape), *_vectors(3, shape[1]), torch.randn(shape))[:count]

    return inputs


def _plain_norm_act(act: str) -> Callable[..., Any]:
    def plain(x: Tensor, weight: Tensor, bias: Tensor, *added: Tensor) -> Any:
        if added:
            x = x + added[0].view(1, -1, 1, 1)
        if len(added) > 1:
            x = x + added[1]
        y = F.group_norm(x, GROUPS, weight, bias, 1e-6)
        y = F.silu(y) if act == "silu" else y
        return (y, x) if len(added) > 1 else y

    return plain


def _our_norm_act(act: Any) -> Callable[..., Any]:
    def ours(x: Tensor, weight: Tensor, bias: Tensor, *added: Tensor) -> Any:
        return norm_act(x, weight, bias, GROUPS, 1e-6, act, *added)  # pyright: ignore[reportCallIssue, reportArgumentType]

    return ours


def _norm_act_conv2d() -> list[Case]:
    def plain(x: Tensor, weight: Tensor, bias: Tensor, conv_weight: Tensor) -> Tensor:
        return F.conv2d(F.silu(F.group_norm(x, GROUPS, weight, bias, 1e-6)), conv_weight, padding=1)

    def inputs(shape: Shape) -> tuple[Tensor, ...]:
        return torch.randn(shape), *_vectors(2, shape[1]), _conv_weight(shape[1])

    def ours(x: Tensor, weight: Tensor, bias: Tensor, conv_weight: Tensor) -> Tensor:
        return norm_act_conv2d(x, Norm(weight, bias, GROUPS), conv_weight, padding=1)

    def kernels(case: Case) -> tuple[str, ...]:
        """Without cuDNN's; the backward pass computes the activation again."""
        return _norm_act_kernels(case) + (("norm_act/apply",) if case.backward else ())

    # forward: norm_act's, and 4 for the convolution's input and output;
    # backward: norm_act's, 8 for the convolution's two passes, and 4 to compute y again
    forward, backward = Bytes(14, 10, 8), Bytes(24, 22, 18)
    common: dict[str, Any] = {"plain": plain, "inputs": inputs, "ours": ours, "kernels": kernels}
    common["differentiable"] = (0, 1, 2, 3)
    return [
        case
        for shape in F8[:3]
        for case in _pair("norm_act_conv2d", "", shape, forward, backward, 18 * shape[1], **common)
    ]


def _row_norm_act() -> list[Case]:
    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.rms_norm(x.movedim(1, -1), (x.shape[1],), weight, 1e-6) + bias).movedim(-1, 1)

    def inputs(shape: Shape) -> tuple[Tensor, ...]:
        return (torch.randn(shape), *_vectors(2, shape[1]))

    common: dict[str, Any] = {"plain": plain, "inputs": inputs, "ours": row_norm_act}
    common["kernels"] = lambda case: (f"row_norm_act/{'backward' if case.backward else 'forward'}",)
    common["differentiable"] = (0, 1, 2)
    forward, backward = Bytes(None, 4, 4), Bytes(None, 6, 6)
    return [case for shape in DEEP for case in _pair("row_norm_act", "", shape, forward, backward, **common)]


def _lpips_head() -> list[Case]:
    def unit(x: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().sum(dim=1, keepdim=True) + 1e-10)

    def plain(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d((unit(a) - unit(b)).square(), weight.view(1, -1, 1, 1)).mean((1, 2, 3))

    def inputs(shape: Shape) -> tuple[Tensor, ...]:
        return torch.randn(shape), torch.randn(shape), torch.rand(shape[1])

    common: dict[str, Any] = {"plain": plain, "inputs": inputs, "ours": lpips_head}
    common["kernels"] = lambda case: (f"lpips_head/{'backward da' if case.backward else 'forward'}",)
    common["differentiable"] = (0,)  # in training only the reconstruction's features have a gradient
    forward, backward = Bytes(None, 4, 4), Bytes(None, 6, 6)
    return [case for shape in VGG for case in _pair("lpips_head", "", shape, forward, backward, **common)]


def _upsample() -> list[Case]:
    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)

    def inputs(shape: Shape) -> tuple[Tensor, ...]:
        return torch.randn(shape), _conv_weight(shape[1]), torch.randn(shape[1])

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # on a GPU "auto" is the plain form until "folded" is measured there
        return upsample_conv2d(x, weight, bias, method="folded" if x.is_cuda else "auto")

    common: dict[str, Any] = {"plain": plain, "inputs": inputs, "ours": ours, "differentiable": (0, 1, 2)}
    common["kernels"] = lambda case: ()  # cuDNN's
    # 16 products and sums per pair of channels and input pixel; x and four outputs, then dy twice,
    # x and dx
    forward, backward = Bytes(None, 10, 10), Bytes(None, 20, 20)
    return [
        case
        for shape in UP
        for case in _pair("upsample_conv2d", "", shape, forward, backward, 32 * shape[1], **common)
    ]

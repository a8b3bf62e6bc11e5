"""Activations whose last additions are left to the normalization that reads them, and the layer steps that pass them on.

A convolution's bias and a residual block's addition each cost a pass over memory of their own on a GPU. The fused kernels do both
on the way into the next normalization, so there a layer hands on its bare output with what remains to be added. Elsewhere (a CPU,
an export) the convolution adds its bias itself and the sum is made at once: native operators are fastest that way.

The steps take `nn.GroupNorm`, `nn.Conv2d` and `nn.Linear` modules of any model: `latentae.fuse` runs them on diffusers'. A step reads
the parameters of plain layers. It calls any other layer: one that is replaced, wrapped, hooked or parametrized (see `plain.py`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from latentae_kernels import Norm, conv3x3, norm_act, norm_act_conv2d, resolve_backend, upsample_conv2d
from torch import Tensor, nn

from latentae.models.plain import is_plain, is_plain_conv, is_plain_norm

__all__ = [
    "Pending",
    "add",
    "attend",
    "convolve",
    "normalize",
    "normalize_activate",
    "normalize_convolve",
    "residual_step",
    "upsample_convolve",
]


class Pending(NamedTuple):
    """`x + bias + residual`, not yet added up."""

    x: Tensor  # [B, C, H, W]
    bias: Tensor | None = None  # [C]
    residual: Tensor | None = None  # [B, C, H, W]

    def value(self) -> Tensor:
        """The sum."""
        total = self.x if self.bias is None else self.x + self.bias.to(self.x.dtype).view(1, -1, 1, 1)
        return total if self.residual is None else total + self.residual


class ResidualLayers(Protocol):
    """The layers of a residual block, here and in diffusers."""

    @property
    def norm1(self) -> nn.Module: ...
    @property
    def conv1(self) -> nn.Module: ...
    @property
    def norm2(self) -> nn.Module: ...
    @property
    def conv2(self) -> nn.Module: ...
    @property
    def conv_shortcut(self) -> nn.Module | None: ...


class AttentionLayers(Protocol):
    """The layers of single-head attention."""

    @property
    def group_norm(self) -> nn.Module: ...
    @property
    def to_q(self) -> nn.Module: ...
    @property
    def to_k(self) -> nn.Module: ...
    @property
    def to_v(self) -> nn.Module: ...
    @property
    def to_out(self) -> nn.ModuleList: ...


def convolve(conv: nn.Module, x: Tensor, *, kernel: int = 3, stride: int = 1, padding: int = 1) -> Pending:
    """A convolution, its bias pending where the kernels can add it for nothing. The shape is that of a plain layer."""
    if not _fused(x) or not is_plain_conv(conv, kernel=kernel, stride=stride, padding=padding):
        return Pending(conv(x))
    return Pending(F.conv2d(x, conv.weight, None, stride, padding), conv.bias)


def upsample_convolve(conv: nn.Module, x: Tensor) -> Pending:
    """Nearest-neighbor doubling and a 3x3 convolution."""
    if not is_plain_conv(conv):
        return Pending(conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))
    if not _fused(x):
        return Pending(upsample_conv2d(x, conv.weight, conv.bias))
    return Pending(upsample_conv2d(x, conv.weight), conv.bias)


def normalize(norm: nn.Module, x: Pending) -> tuple[Tensor, Pending]:
    """GroupNorm without activation; returns its input too, for the skip around it."""
    if not is_plain_norm(norm):
        total = x.value()
        return norm(total), Pending(total)
    arguments = (norm.weight, norm.bias, norm.num_groups, norm.eps, "identity", x.bias)
    if x.residual is None:
        return norm_act(x.x, *arguments), Pending(x.x, x.bias)
    y, total = norm_act(x.x, *arguments, residual=x.residual)
    return y, Pending(total)


def normalize_activate(norm: nn.Module, x: Tensor) -> Tensor:
    """GroupNorm and SiLU."""
    if not is_plain_norm(norm):
        return F.silu(norm(x))
    return norm_act(x, norm.weight, norm.bias, norm.num_groups, norm.eps, "silu")


def normalize_convolve(
    norm: nn.Module, conv: nn.Module, x: Pending, *, last_use: bool = False
) -> tuple[Pending, Pending]:
    """GroupNorm, SiLU and a 3x3 convolution of stride 1; returns the input of the norm too, for the skip around it.

    `last_use`: nobody reads x afterwards, so a CPU may write the result into its memory (the second value is then void).
    """
    if not (is_plain_norm(norm) and is_plain_conv(conv)):
        total = x.value()
        return convolve(conv, normalize_activate(norm, total)), Pending(total)
    step = Norm(norm.weight, norm.bias, norm.num_groups, norm.eps)
    if not _fused(x.x):
        total = x.value()
        return Pending(conv3x3(total, conv.weight, conv.bias, step, overwrite=last_use)), Pending(total)
    arguments = (step, conv.weight, None, 1, x.bias)
    if x.residual is None:
        return Pending(norm_act_conv2d(x.x, *arguments), conv.bias), Pending(x.x, x.bias)
    out, total = norm_act_conv2d(x.x, *arguments, residual=x.residual)
    return Pending(out, conv.bias), Pending(total)


def add(branch: Pending, skip: Pending, *, overwrite: bool) -> Pending:
    """Add a branch to its skip, or leave the addition to the next normalization.

    `overwrite`: the branch comes from a plain layer, so nobody else has its memory.
    """
    if _fused(branch.x):
        bias = (
            branch.bias
            if skip.bias is None
            else skip.bias
            if branch.bias is None
            else branch.bias + skip.bias
        )
        return Pending(branch.x, bias, skip.x)
    x, y = branch.value(), skip.value()
    if not overwrite or torch.is_grad_enabled() or torch.compiler.is_exporting():
        return Pending(y + x)
    return Pending(x.add_(y))  # fresh memory costs a CPU more than the addition


def residual_step(block: ResidualLayers, x: Pending) -> Pending:
    """Two norm-activation-convolution steps around a skip."""
    h, skip = normalize_convolve(block.norm1, block.conv1, x)
    h, _ = normalize_convolve(block.norm2, block.conv2, h, last_use=is_plain_conv(block.conv1))
    if block.conv_shortcut is not None:
        skip = convolve(block.conv_shortcut, skip.value(), kernel=1, padding=0)
    return add(h, skip, overwrite=is_plain_conv(block.conv2))


def attend(attention: AttentionLayers, x: Pending) -> Pending:
    """Single-head self-attention over all pixels, around a skip."""
    y, skip = normalize(attention.group_norm, x)
    tokens = y.flatten(2).transpose(1, 2)  # [B, HW, C]
    layers = (attention.to_q, attention.to_k, attention.to_v)
    q, k, v = (layer(tokens).unsqueeze(1) for layer in layers)  # [B, 1 head, HW, C]
    last = attention.to_out[0]
    out: Tensor = last(F.scaled_dot_product_attention(q, k, v).squeeze(1))
    return add(Pending(out.transpose(1, 2).reshape(y.shape)), skip, overwrite=is_plain(last, nn.Linear))


def _fused(x: Tensor) -> bool:
    return resolve_backend("norm_act", "auto", x) == "triton"

"""Activations whose last additions are left to the normalization that reads them, and the layer steps that pass them on.

A convolution's bias and a residual block's addition each cost a pass over memory of their own on a GPU. The fused kernels do both
on the way into the next normalization, so there a layer hands on its bare output with what remains to be added. Elsewhere (a CPU,
an export) the convolution adds its bias itself and the sum is made at once: native operators are fastest that way.

The steps read plain `nn.GroupNorm`, `nn.Conv2d` and `nn.Linear` modules, whoever made them: `latentae.fuse` runs them on diffusers'.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from latentae_kernels import Norm, conv3x3, norm_act, norm_act_conv2d, resolve_backend, upsample_conv2d
from torch import Tensor, nn

__all__ = ["Pending", "add", "attend", "convolve", "normalize", "normalize_convolve", "residual_step", "upsample_convolve"]


class Pending(NamedTuple):
    """`x + bias + residual`, not yet added up."""

    x: Tensor  # [B, C, H, W]
    bias: Tensor | None = None  # [C]
    residual: Tensor | None = None  # [B, C, H, W]

    def value(self) -> Tensor:
        """The sum."""
        total = self.x if self.bias is None else self.x + self.bias.to(self.x.dtype).view(1, -1, 1, 1)
        return total if self.residual is None else total + self.residual


def convolve(conv: nn.Conv2d, x: Tensor) -> Pending:
    """A convolution, its bias pending where the kernels can add it for nothing."""
    if not _fused(x):
        return Pending(conv(x))
    return Pending(F.conv2d(x, conv.weight, None, conv.stride, conv.padding), conv.bias)  # pyright: ignore[reportArgumentType]


def upsample_convolve(conv: nn.Conv2d, x: Tensor) -> Pending:
    """Nearest-neighbour doubling and a 3x3 convolution."""
    if not _fused(x):
        return Pending(upsample_conv2d(x, conv.weight, conv.bias))
    return Pending(upsample_conv2d(x, conv.weight), conv.bias)


def normalize(norm: nn.GroupNorm, x: Pending) -> tuple[Tensor, Pending]:
    """GroupNorm without activation; returns what was normalized too, for the skip around it."""
    arguments = (norm.weight, norm.bias, norm.num_groups, norm.eps, "identity", x.bias)
    if x.residual is None:
        return norm_act(x.x, *arguments), Pending(x.x, x.bias)
    y, total = norm_act(x.x, *arguments, residual=x.residual)
    return y, Pending(total)


def normalize_convolve(norm: nn.GroupNorm, conv: nn.Conv2d, x: Pending, *, last_use: bool = False) -> tuple[Pending, Pending]:
    """GroupNorm, SiLU and a 3x3 convolution of stride 1; returns what was normalized too, for the skip around it.

    `last_use`: nobody reads x afterwards, so a CPU may write the result into its memory (the second value is then void).
    """
    if not _fused(x.x):
        total = x.value()
        step = Norm(norm.weight, norm.bias, norm.num_groups, norm.eps)
        return Pending(conv3x3(total, conv.weight, conv.bias, step, overwrite=last_use)), Pending(total)
    arguments = (norm.weight, norm.bias, norm.num_groups, conv.weight, None, 1, norm.eps, "silu", x.bias)
    if x.residual is None:
        return Pending(norm_act_conv2d(x.x, *arguments), conv.bias), Pending(x.x, x.bias)
    out, total = norm_act_conv2d(x.x, *arguments, residual=x.residual)
    return Pending(out, conv.bias), Pending(total)


def add(branch: Pending, skip: Pending) -> Pending:
    """A branch, whose memory nobody else reads, onto its skip: left to the next normalization, or made at once."""
    if _fused(branch.x):
        bias = branch.bias if skip.bias is None else skip.bias if branch.bias is None else branch.bias + skip.bias
        return Pending(branch.x, bias, skip.x)
    x, y = branch.value(), skip.value()
    if torch.is_grad_enabled() or torch.compiler.is_exporting():
        return Pending(y + x)
    return Pending(x.add_(y))  # fresh memory costs a CPU more than the addition


def residual_step(block: nn.Module, x: Pending) -> Pending:
    """Two norm-activation-convolution steps around a skip; `block` has norm1, conv1, norm2, conv2 and conv_shortcut (or None)."""
    norm1, norm2, conv1, conv2, shortcut = block.norm1, block.norm2, block.conv1, block.conv2, block.conv_shortcut
    h, skip = normalize_convolve(norm1, conv1, x)  # pyright: ignore[reportArgumentType]
    h, _ = normalize_convolve(norm2, conv2, h, last_use=True)  # pyright: ignore[reportArgumentType]
    return add(h, skip if shortcut is None else convolve(shortcut, skip.value()))  # pyright: ignore[reportArgumentType]


def attend(attention: nn.Module, x: Pending) -> Pending:
    """Single-head self-attention over all pixels, around a skip; `attention` has group_norm, to_q, to_k, to_v and to_out[0]."""
    y, skip = normalize(attention.group_norm, x)  # pyright: ignore[reportArgumentType]
    tokens = y.flatten(2).transpose(1, 2)  # [B, HW, C]
    layers = (attention.to_q, attention.to_k, attention.to_v)
    q, k, v = (layer(tokens).unsqueeze(1) for layer in layers)  # pyright: ignore[reportCallIssue]  # [B, 1 head, HW, C]
    mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
    out = attention.to_out[0](mixed)  # pyright: ignore
    return add(Pending(out.transpose(1, 2).reshape(y.shape)), skip)


def _fused(x: Tensor) -> bool:
    return resolve_backend("norm_act", "auto", x) == "triton"

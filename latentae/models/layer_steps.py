"""Layer steps that leave the last additions of an activation to the next normalization.

On a GPU a convolution's bias and a residual block's addition each cost a pass over memory. The
fused kernels compute both while they read the input of the next normalization, so there a layer
returns its bare output and the pending additions. Elsewhere (a CPU, an export) the convolution adds
its bias and the sum is computed at once, which is fastest with native operators.

The steps take `nn.GroupNorm`, `nn.Conv2d` and `nn.Linear` modules of any model: `latentae.fuse`
runs them on those of diffusers. A step reads the parameters of plain layers. It calls every other
layer: one that is replaced, wrapped, hooked or parametrized (see `is_plain`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from latentae_kernels import Norm, conv3x3, norm_act, norm_act_conv2d, resolve_backend, upsample_conv2d
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

__all__ = [
    "Pending",
    "add",
    "attend",
    "convolve",
    "has_hooks",
    "is_plain",
    "is_plain_conv",
    "is_unhooked",
    "normalize",
    "normalize_activate",
    "normalize_convolve",
    "residual_step",
    "upsample_convolve",
]


class Pending(NamedTuple):
    """`x + bias + residual`, not yet added."""

    x: Tensor  # [B, C, H, W]
    bias: Tensor | None = None  # [C]
    residual: Tensor | None = None  # [B, C, H, W]

    def value(self) -> Tensor:
        """The sum."""
        total = self.x if self.bias is None else self.x + self.bias.to(self.x.dtype).view(1, -1, 1, 1)
        return total if self.residual is None else total + self.residual


def convolve(conv: nn.Module, x: Tensor, *, kernel: int = 3, stride: int = 1, padding: int = 1) -> Pending:
    """A convolution with a pending bias if the kernels can add it at no cost.

    `kernel`, `stride` and `padding` are those of a plain layer here.
    """
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
    """GroupNorm without activation; also returns its input, for the skip around it."""
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
    """GroupNorm, SiLU and a 3x3 convolution of stride 1; also returns the norm's input.

    `last_use`: x is not read later, so a CPU may write the result to its memory; the second value
    is then invalid.
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

    `overwrite`: the branch comes from a plain layer, so nothing else uses its memory.
    """
    if _fused(branch.x):
        biases = [bias for bias in (branch.bias, skip.bias) if bias is not None]
        bias = biases[0] + biases[1] if len(biases) == 2 else next(iter(biases), None)
        return Pending(branch.x, bias, skip.x)
    x, y = branch.value(), skip.value()
    if not overwrite or torch.is_grad_enabled() or torch.compiler.is_exporting():
        return Pending(y + x)
    return Pending(x.add_(y))  # fresh memory costs a CPU more than the addition


def residual_step(block: Any, x: Pending) -> Pending:
    """Two norm-activation-convolution steps around a skip; the layers have diffusers' names."""
    h, skip = normalize_convolve(block.norm1, block.conv1, x)
    h, _ = normalize_convolve(block.norm2, block.conv2, h, last_use=is_plain_conv(block.conv1))
    if block.conv_shortcut is not None:
        skip = convolve(block.conv_shortcut, skip.value(), kernel=1, padding=0)
    return add(h, skip, overwrite=is_plain_conv(block.conv2))


def attend(attention: Any, x: Pending) -> Pending:
    """Single-head self-attention around a skip; the layers have diffusers' names."""
    y, skip = normalize(attention.group_norm, x)
    tokens = y.flatten(2).transpose(1, 2)  # [B, HW, C]
    layers = (attention.to_q, attention.to_k, attention.to_v)
    q, k, v = (layer(tokens).unsqueeze(1) for layer in layers)  # [B, 1 head, HW, C]
    last = attention.to_out[0]
    out: Tensor = last(F.scaled_dot_product_attention(q, k, v).squeeze(1))
    return add(Pending(out.transpose(1, 2).reshape(y.shape)), skip, overwrite=is_plain(last, nn.Linear))


def _fused(x: Tensor) -> bool:
    return resolve_backend("norm_act", "auto", x) == "triton"


def has_hooks(module: nn.Module) -> bool:
    """Whether a call runs torch's hooks; weight norm, spectral norm and pruning are pre-hooks."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or bool(_has_any_global_hook())


def is_unhooked(module: nn.Module) -> bool:
    """Whether a call runs only the forward of the module's class.

    Offloading in accelerate and diffusers, and `latentae.fuse`, set an instance attribute
    `forward`.
    """
    return "forward" not in module.__dict__ and not has_hooks(module)


def is_plain(module: Any, *kinds: type[nn.Module]) -> bool:
    """Whether a module has exactly one of the classes and is unhooked.

    A parametrized, quantized or adapted layer (LoRA) has another class.
    """
    return type(module) in kinds and is_unhooked(module)


def is_plain_conv(conv: Any, *, kernel: int = 3, stride: int = 1, padding: int = 1) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is a plain zero-padded square convolution, one group, no dilation."""
    return (
        is_plain(conv, nn.Conv2d)
        and conv.kernel_size == (kernel, kernel)
        and conv.stride == (stride, stride)
        and conv.padding == (padding, padding)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def is_plain_norm(norm: Any) -> TypeGuard[nn.GroupNorm]:
    """Whether a layer is a plain GroupNorm with weight and bias."""
    return is_plain(norm, nn.GroupNorm) and norm.affine

"""Check that a layer is plain: a fused step may read its parameters instead of calling it."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["has_hooks", "is_plain", "is_plain_conv", "is_plain_norm", "is_unhooked"]


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

"""Run diffusers' autoencoders on the fused steps, in place.

Modules, parameters, state-dict keys, attention processors, tiling and slicing stay diffusers' own.
Only the `forward` of the blocks in the report changes. diffusers is not imported: its blocks are
known by name, and checked for what the fused steps can compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from latentae_kernels import norm_act, row_norm_act
from torch import Tensor, nn

from latentae.errors import ModelError
from latentae.models.dc.blocks import add, convolve
from latentae.models.layer_steps import Pending, has_hooks, is_plain, residual_step, upsample_convolve

__all__ = ["Fusion", "fuse"]

Act = Literal["silu", "identity"]


@dataclass
class Fusion:
    """Report of `fuse`: replaced blocks by type, and blocks that were left, with the reason."""

    module: nn.Module
    replaced: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    _patched: list[nn.Module] = field(default_factory=list, repr=False)
    _contiguous: bool = field(default=True, repr=False)

    def undo(self) -> None:
        """Restore the module's own forwards and memory order. A second call does nothing."""
        for module in self._patched:
            own = MethodType(type(module).forward, module)
            if "_old_forward" in module.__dict__:  # accelerate's hooks came later and call it by this name
                module.__dict__["_old_forward"] = own
            elif chain := _diffusers_hooks(module):  # diffusers' came later; the first of them calls it
                chain[0].forward = own
            else:
                module.__dict__.pop("forward", None)
        if self._patched and self._contiguous:
            _set_order(self.module, torch.contiguous_format)
        self._patched.clear()

    def __enter__(self) -> Fusion:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        counts = ", ".join(f"{len(names)} {label}" for label, names in self.replaced.items())
        left = (f"left {name}: {reason}" for name, reason in self.left.items())
        return "\n".join([f"fused: {counts or 'nothing'}", *left])

    def _replace(
        self, name: str, child: nn.Module, label: str, forward: Callable[..., Tensor], reason: str | None
    ) -> None:
        """Patch a module's forward, or record the reason against it."""
        if reason is None and "forward" in child.__dict__:
            reason = "its forward has been replaced already"
        if reason is not None:
            self.left[name] = reason
            return
        self._patch(child, forward)
        self.replaced.setdefault(label, []).append(name)

    def _replace_head(
        self, name: str, norm: nn.Module, coder: nn.Module, reason: str | None, forward: Callable[..., Tensor]
    ) -> None:
        """Let the last normalization also compute the activation, while both are unhooked."""
        activation, own = getattr(coder, "conv_act", None), name.rpartition(".")[2]
        if reason is None:
            reason = _not_plain(activation, nn.SiLU)
        if reason is None and activation is not None and "forward" in activation.__dict__:
            reason = "the forward of its activation has been replaced already"
        head = partial(_head_normalize, coder, own, forward)
        self._replace(name, norm, "output normalizations", head, reason)
        if name not in self.left and activation is not None:
            self._patch(activation, partial(_head_activate, coder, own))

    def _patch(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        module.forward = _Patch(
            forward, module
        )  # on the instance: the class, and with it undo, stays unchanged
        self._patched.append(module)


class _Patch(partial):
    """A forward that `fuse` sets on a module; other libraries set plain partials."""


def fuse(module: nn.Module) -> Fusion:
    """Run a diffusers `AutoencoderKL` or `AutoencoderDC`, or its coders, on the fused kernels.

    The model becomes channels_last. On an NVIDIA GPU every GroupNorm + SiLU becomes one kernel,
    which also adds convolution biases and residuals; training does not store the activation in
    between. Every RMSNorm becomes one kernel. On a CPU the same blocks use native operators in the
    faster memory order, and a faster convolution for inference. Outputs are the same to the
    rounding of the dtype. Attention, tiling, slicing, hooks and gradient checkpointing keep
    working.

    Returns:
        The report, which can undo the change: `latentae.fuse(vae).undo()`, or `with
        latentae.fuse(vae): ...`.

    Raises:
        ModelError: `module` has no known block, or all of them are left.
    """
    contiguous = all(p.is_contiguous() for p in module.parameters() if p.ndim == 4)
    fusion = Fusion(module, _contiguous=contiguous)
    for name, child in module.named_modules():
        of, (place, _, own) = _class_of(child), name.rpartition(".")
        parent = module.get_submodule(place)
        if of in _FORWARDS:
            label, forward, check = _FORWARDS[of]
            fusion._replace(name, child, label, forward, check(child))
        elif own == "conv_norm_out":
            reason = _not_plain(child, nn.GroupNorm)
            fusion._replace_head(name, child, parent, reason, partial(_normalize, act="silu"))
        elif of == "RMSNorm" and (_class_of(parent), own) in _RMS_NORMS:
            reason = _rms_obstacle(child)
            if reason is None and type(getattr(parent, "conv_act", None)) is nn.SiLU:
                fusion._replace_head(name, child, parent, reason, partial(_rms_normalize, act="silu"))
            else:
                fusion._replace(name, child, "RMS normalizations", _rms_normalize, reason)
        elif own == "group_norm" and place and not place.endswith("spatial_norm"):
            reason = _not_plain(child, nn.GroupNorm)
            fusion._replace(name, child, "attention normalizations", _normalize, reason)
    if not fusion.replaced:
        left = "; ".join(f"{name}: {reason}" for name, reason in fusion.left.items())
        found = left or "no block of diffusers' AutoencoderKL or AutoencoderDC"
        raise ModelError(
            f"fuse: nothing to replace in {type(module).__name__} ({found}); give a diffusers AutoencoderKL "
            "or AutoencoderDC"
        )
    _set_order(module, torch.channels_last)
    return fusion


def _class_of(module: nn.Module) -> str:
    """Name of a diffusers class, "" for others. Only AutoencoderDC's ResBlock and Decoder count."""
    name, source = type(module).__name__, type(module).__module__
    elsewhere = name in ("ResBlock", "Decoder") and not source.endswith(".autoencoder_dc")
    return name if source.startswith("diffusers.") and not elsewhere else ""


def _head_normalize(
    coder: nn.Module, own: str, forward: Callable[..., Tensor], norm: nn.Module, x: Tensor
) -> Tensor:
    return forward(norm, x) if _joined(coder, own) else type(norm).forward(norm, x)


def _head_activate(coder: nn.Module, own: str, _: nn.Module, x: Tensor) -> Tensor:
    return x if _joined(coder, own) else nn.functional.silu(x)


def _joined(coder: nn.Module, own: str) -> bool:
    """Whether the last normalization computes its activation: both are only patched."""
    layers = (getattr(coder, own), getattr(coder, "conv_act", None))
    return all(isinstance(layer, nn.Module) and not _changed(layer) for layer in layers)


def _set_order(module: nn.Module, order: torch.memory_format) -> None:
    """Set the memory order of 4D weights; `Module.to` refuses a module that has 5D weights too."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=order)


def _changed(module: nn.Module) -> bool:
    """Whether a call does more than the patch: hooks, or a forward that was set on top of it."""
    return has_hooks(module) or not isinstance(module.__dict__.get("forward"), _Patch)


def _diffusers_hooks(module: nn.Module) -> list[Any]:
    """Hooks of diffusers (offloading, layerwise casting); the first calls the forward."""
    return getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", [])


def _not_plain(module: nn.Module | None, of: type[nn.Module]) -> str | None:
    if type(module) is not of:
        return f"it is a {type(module).__name__}, not a plain {of.__name__}"
    if isinstance(module, nn.GroupNorm) and not module.affine:
        return "it has no weight"
    return None


def _conv_obstacle(block: Any, *names: str) -> str | None:
    """Why one of a block's convolutions is not that of the fused step."""
    for name in names:
        conv: Any = getattr(block, name, None)
        if name == "conv_shortcut" and conv is None:
            continue
        if reason := _not_plain(conv, nn.Conv2d):
            return f"{name}: {reason}"
        shape = (conv.kernel_size, conv.padding)
        same = shape == ((3, 3), (1, 1)) or (name == "conv_shortcut" and shape == ((1, 1), (0, 0)))
        rest = (conv.stride, conv.dilation, conv.groups, conv.padding_mode)
        if not same or rest != ((1, 1), (1, 1), 1, "zeros"):
            return f"{name}: {conv} is not the convolution of the fused step"
    return None


def _resnet_obstacle(block: Any) -> str | None:
    """Why a ResnetBlock2D does something that the fused step doesn't."""
    for name, of in (("norm1", nn.GroupNorm), ("norm2", nn.GroupNorm), ("nonlinearity", nn.SiLU)):
        if reason := _not_plain(getattr(block, name, None), of):
            return f"{name}: {reason}"
    if reason := _conv_obstacle(block, "conv1", "conv2", "conv_shortcut"):
        return reason
    if getattr(block, "time_emb_proj", None) is not None or block.time_embedding_norm == "scale_shift":
        return "it takes a time embedding"
    if block.upsample is not None or block.downsample is not None:
        return "it resamples inside"
    if block.output_scale_factor != 1 or block.dropout.p > 0:
        return "it scales its output or drops activations"
    return None


def _resnet_forward(
    block: Any, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    if temb is not None or not _can_step(block):
        return type(block).forward(block, input_tensor, temb, *args, **kwargs)
    return residual_step(block, Pending(input_tensor)).value()


def _can_step(block: Any) -> bool:
    """Whether the layers without parameters are those that the fused step computes itself."""
    dropout = block.dropout
    return is_plain(block.nonlinearity, nn.SiLU) and is_plain(dropout, nn.Dropout) and dropout.p == 0


def _chained(block: Any, x: Pending) -> Pending:
    """One residual block of a chain; called as a module if the fused step differs."""
    if _class_of(block) == "ResnetBlock2D" and not _changed(block) and _can_step(block):
        return residual_step(block, x)
    return Pending(block(x.value(), None))


def _level_forward(
    block: Any, hidden_states: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """DownEncoderBlock2D and UpDecoderBlock2D."""
    if temb is not None or args or kwargs:
        arguments = (hidden_states, *args) if temb is None else (hidden_states, temb, *args)
        return type(block).forward(block, *arguments, **kwargs)
    h = Pending(hidden_states)
    for resnet in block.resnets:
        h = _chained(resnet, h)
    x = h.value()
    for resample in getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None) or ():
        x = resample(x)
    return x


def _middle_forward(block: Any, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
    """UNetMidBlock2D."""
    if temb is not None or (torch.is_grad_enabled() and block.gradient_checkpointing):
        return type(block).forward(block, hidden_states, temb)
    h = _chained(block.resnets[0], Pending(hidden_states))
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            h = Pending(attention(h.value(), temb=temb))
        h = _chained(resnet, h)
    return h.value()


def _upsample_forward(
    block: Any, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Upsample2D."""
    if output_size is not None or args or kwargs:
        return type(block).forward(block, hidden_states, output_size, *args, **kwargs)
    return upsample_convolve(block.conv, hidden_states).value()


def _upsample_obstacle(block: Any) -> str | None:
    doubles = block.use_conv and block.interpolate and not block.use_conv_transpose
    if not doubles or block.name != "conv" or block.norm is not None:
        return "it is not nearest-neighbor doubling and a convolution"
    return _conv_obstacle(block, "conv")


def _normalize(norm: Any, x: Tensor, act: Act = "identity") -> Tensor:
    return norm_act(x, norm.weight, norm.bias, norm.num_groups, norm.eps, act)


def _rms_obstacle(norm: Any) -> str | None:
    """Why an RMSNorm does something that the kernel doesn't."""
    if norm.weight is None or norm.weight.ndim != 1:
        return "it has no weight for each channel"
    return None if norm.eps > 0 else "its eps is not above zero"


def _rms_normalize(norm: Any, x: Tensor, act: Act = "identity") -> Tensor:
    """[..., C], normalized over its last axis."""
    if norm.weight.dtype not in (x.dtype, torch.float32):  # weights stored in another type than computed in
        y = type(norm).forward(norm, x)
        return y if act == "identity" else nn.functional.silu(y)
    return row_norm_act(x.movedim(-1, 1), norm.weight, norm.bias, norm.eps, "rms", act).movedim(1, -1)


def _dc_residual_forward(block: Any, hidden_states: Tensor) -> Tensor:
    """ResBlock."""
    h = convolve(block.conv2, block.nonlinearity(convolve(block.conv1, hidden_states)))
    h = block.norm(h.movedim(1, -1)).movedim(-1, 1) if block.norm_type == "rms_norm" else block.norm(h)
    fresh = is_plain(block.norm, nn.BatchNorm2d) or not _changed(block.norm)
    return add(h, hidden_states, overwrite=fresh)


def _dc_residual_obstacle(block: Any) -> str | None:
    return _conv_obstacle(block, "conv1", "conv2")


def _no_obstacle(_: nn.Module) -> None:
    return None


# class name -> its name in the report, its forward, and the reason to leave one
_FORWARDS: dict[str, tuple[str, Callable[..., Tensor], Callable[[Any], str | None]]] = {
    "ResnetBlock2D": ("residual blocks", _resnet_forward, _resnet_obstacle),
    "DownEncoderBlock2D": ("levels", _level_forward, _no_obstacle),
    "UpDecoderBlock2D": ("levels", _level_forward, _no_obstacle),
    "Upsample2D": ("upsamplers", _upsample_forward, _upsample_obstacle),
    "UNetMidBlock2D": ("middle blocks", _middle_forward, _no_obstacle),
    "ResBlock": ("residual blocks", _dc_residual_forward, _dc_residual_obstacle),
}
# the RMSNorms of AutoencoderDC: class of the parent, and name; other models have others
_RMS_NORMS = {
    ("ResBlock", "norm"),
    ("GLUMBConv", "norm"),
    ("SanaMultiscaleLinearAttention", "norm_out"),
    ("Decoder", "norm_out"),
}

"""Put the fused steps into a diffusers autoencoder, in place.

Modules, parameters, state-dict keys, attention processors, tiling and slicing stay diffusers' own; only the `forward` of the blocks
named in the report is another. diffusers is not imported: its blocks are known by name and held to what the fused steps can do.
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
from latentae.models.pending import Pending, residual_step, upsample_convolve
from latentae.models.plain import has_hooks, is_plain

__all__ = ["Fusion", "fuse"]


@dataclass
class Fusion:
    """What `fuse` did: names of the blocks it replaced, by kind, and of those it left, with the reason. `undo()` takes it back."""

    module: nn.Module
    replaced: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    _patched: list[nn.Module] = field(default_factory=list, repr=False)
    _contiguous: bool = field(default=True, repr=False)

    def undo(self) -> None:
        """Give the module its own forwards and memory order back. Calling it twice does nothing."""
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
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in self.replaced.items())
        lines = [f"fused: {counts or 'nothing'}"]
        lines += [f"left {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def fuse(module: nn.Module) -> Fusion:
    """Run a diffusers `AutoencoderKL` or `AutoencoderDC` (or its encoder or decoder) on the fused kernels, channels last.

    On an NVIDIA GPU every GroupNorm + SiLU becomes one kernel, and convolution biases and residual additions are folded into it; in
    training the activation in between is not kept. Every RMSNorm becomes one kernel. On a CPU the same blocks use native operators in the
    faster memory order, and a faster convolution for inference.
    Outputs are the same to the rounding of the dtype. Attention, tiling, slicing, hooks and gradient checkpointing go on working.

    Returns:
        The report, which also undoes it: `latentae.fuse(vae).undo()`, or `with latentae.fuse(vae): ...`.

    Raises:
        ModelError: no block that it knows is in `module`, or all of them are left.
    """
    fusion = Fusion(module, _contiguous=_is_contiguous(module))
    for name, child in module.named_modules():
        kind, parent = _class_of(child), name.rpartition(".")[0]
        if kind in _FORWARDS:
            label, forward, check = _FORWARDS[kind]
            _replace(fusion, name, child, label, forward, check(child))
        elif name.rsplit(".", 1)[-1] == "conv_norm_out":
            _replace_head(
                fusion,
                name,
                child,
                module.get_submodule(parent),
                _not_plain(child, nn.GroupNorm),
                _normalize_activate,
            )
        elif (
            kind == "RMSNorm"
            and (_class_of(module.get_submodule(parent)), name.rpartition(".")[2]) in _RMS_NORMS
        ):
            _replace_rms(fusion, name, child, module.get_submodule(parent))
        elif name.endswith(".group_norm") and not name.endswith("spatial_norm.group_norm"):
            _replace(
                fusion, name, child, "attention normalizations", _normalize, _not_plain(child, nn.GroupNorm)
            )
    if not fusion.replaced:
        found = (
            "; ".join(f"{name}: {reason}" for name, reason in fusion.left.items())
            or "no block of diffusers' AutoencoderKL or AutoencoderDC"
        )
        raise ModelError(
            f"fuse: nothing to replace in {type(module).__name__} ({found}); give a diffusers AutoencoderKL or AutoencoderDC"
        )
    _set_order(module, torch.channels_last)
    return fusion


def _class_of(module: nn.Module) -> str:
    """Name of a class of diffusers, and "" of others; several have a ResBlock and a Decoder, here AutoencoderDC's are meant."""
    kind, home = type(module).__name__, type(module).__module__
    elsewhere = kind in ("ResBlock", "Decoder") and not home.endswith(".autoencoder_dc")
    return kind if home.startswith("diffusers.") and not elsewhere else ""


class _Patch(partial):
    """A forward that `fuse` puts on a module; other libraries put plain partials there."""


def _replace(
    fusion: Fusion,
    name: str,
    child: nn.Module,
    kind: str,
    forward: Callable[..., Tensor],
    reason: str | None,
    *bound: Any,
) -> None:
    if reason is None and "forward" in child.__dict__:
        reason = "its forward has been replaced already"
    if reason is not None:
        fusion.left[name] = reason
        return
    child.forward = _Patch(
        forward, child, *bound
    )  # an instance attribute: the class, and with it undo, stays untouched
    fusion._patched.append(child)
    fusion.replaced.setdefault(kind, []).append(name)


def _replace_head(
    fusion: Fusion,
    name: str,
    norm: nn.Module,
    coder: nn.Module,
    reason: str | None,
    forward: Callable[..., Tensor],
) -> None:
    """The last normalization takes in the activation after it, as long as both layers are there and unhooked."""
    activation = getattr(coder, "conv_act", None)
    if reason is None:
        reason = _not_plain(activation, nn.SiLU)
    if reason is None and activation is not None and "forward" in activation.__dict__:
        reason = "the forward of its activation has been replaced already"
    place = name.rpartition(".")[2]
    _replace(fusion, name, norm, "output normalizations", _head_normalize, reason, coder, place, forward)
    if name not in fusion.left and activation is not None:
        activation.forward = _Patch(_head_activate, activation, coder, place)
        fusion._patched.append(activation)


def _head_normalize(
    norm: Any, coder: nn.Module, place: str, forward: Callable[..., Tensor], x: Tensor
) -> Tensor:
    return forward(norm, x) if _joined(coder, place) else type(norm).forward(norm, x)


def _head_activate(_: nn.Module, coder: nn.Module, place: str, x: Tensor) -> Tensor:
    return x if _joined(coder, place) else nn.functional.silu(x)


def _joined(coder: nn.Module, place: str) -> bool:
    """Whether the last normalization takes in its activation: both layers are the patched ones and unhooked."""
    layers = (getattr(coder, place), getattr(coder, "conv_act", None))
    return all(isinstance(layer, nn.Module) and not _changed(layer) for layer in layers)


def _replace_rms(fusion: Fusion, name: str, norm: nn.Module, parent: nn.Module) -> None:
    """An RMSNorm of AutoencoderDC, with the activation after it where there is a SiLU."""
    reason = _rms_obstacle(norm)
    if reason is None and type(getattr(parent, "conv_act", None)) is nn.SiLU:
        _replace_head(fusion, name, norm, parent, reason, _rms_activate)
    else:
        _replace(fusion, name, norm, "RMS normalizations", _rms_normalize, reason)


def _set_order(module: nn.Module, order: torch.memory_format) -> None:
    """Give weights of images a memory order; `Module.to` refuses a module that has weights of videos too."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=order)


def _is_contiguous(module: nn.Module) -> bool:
    return all(p.is_contiguous() for p in module.parameters() if p.ndim == 4)


def _changed(module: nn.Module) -> bool:
    """Whether a call of a patched module does more than the patch: hooks, or a forward that was put on top of it."""
    return has_hooks(module) or not isinstance(module.__dict__.get("forward"), _Patch)


def _diffusers_hooks(module: nn.Module) -> list[Any]:
    """What diffusers' own hooks (group offloading, layerwise casting) call in turn, the module's forward at the first."""
    return getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", [])


def _not_plain(module: nn.Module | None, kind: type[nn.Module]) -> str | None:
    if type(module) is not kind:
        return f"it is a {type(module).__name__}, not a plain {kind.__name__}"
    if isinstance(module, nn.GroupNorm) and not module.affine:
        return "it has no weight"
    return None


def _conv_obstacle(name: str, conv: Any) -> str | None:
    reason = _not_plain(conv, nn.Conv2d)
    if reason is not None:
        return f"{name}: {reason}"
    shape = (conv.kernel_size, conv.padding)
    same = shape == ((3, 3), (1, 1)) or (name == "conv_shortcut" and shape == ((1, 1), (0, 0)))
    if (
        not same
        or conv.stride != (1, 1)
        or conv.dilation != (1, 1)
        or conv.groups != 1
        or conv.padding_mode != "zeros"
    ):
        return f"{name}: {conv} is not the convolution that the fused step does"
    return None


def _resnet_obstacle(block: Any) -> str | None:
    """Why a ResnetBlock2D does something that the fused step doesn't."""
    for name, kind in (("norm1", nn.GroupNorm), ("norm2", nn.GroupNorm), ("nonlinearity", nn.SiLU)):
        reason = _not_plain(getattr(block, name, None), kind)
        if reason is not None:
            return f"{name}: {reason}"
    for name in ("conv1", "conv2", "conv_shortcut"):
        conv: Any = getattr(block, name, None)
        if name == "conv_shortcut" and conv is None:
            continue
        reason = _conv_obstacle(name, conv)
        if reason is not None:
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
    return (
        is_plain(block.nonlinearity, nn.SiLU) and is_plain(block.dropout, nn.Dropout) and block.dropout.p == 0
    )


def _chained(block: Any, x: Pending) -> Pending:
    """One residual block of a chain, its last additions pending; called as a module where that is not the same."""
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
    if (
        not block.use_conv
        or block.use_conv_transpose
        or not block.interpolate
        or block.name != "conv"
        or block.norm is not None
    ):
        return "it is not nearest-neighbour doubling and a convolution"
    return _conv_obstacle("conv", block.conv)


def _normalize(norm: Any, x: Tensor) -> Tensor:
    return norm_act(x, norm.weight, norm.bias, norm.num_groups, norm.eps, "identity")


def _normalize_activate(norm: Any, x: Tensor) -> Tensor:
    return norm_act(x, norm.weight, norm.bias, norm.num_groups, norm.eps, "silu")


def _rms_obstacle(norm: Any) -> str | None:
    """Why an RMSNorm does something that the kernel doesn't."""
    if norm.weight is None or norm.weight.ndim != 1:
        return "it has no weight for each channel"
    return None if norm.eps > 0 else "its eps is not above zero"


def _rms_normalize(norm: Any, x: Tensor, act: Literal["silu", "identity"] = "identity") -> Tensor:
    """[..., C], normalized over its last axis."""
    if norm.weight.dtype not in (
        x.dtype,
        torch.float32,
    ):  # as where weights are stored in another type than computed in
        y = type(norm).forward(norm, x)
        return y if act == "identity" else nn.functional.silu(y)
    return row_norm_act(x.movedim(-1, 1), norm.weight, norm.bias, norm.eps, "rms", act).movedim(1, -1)


def _rms_activate(norm: Any, x: Tensor) -> Tensor:
    return _rms_normalize(norm, x, "silu")


def _dc_residual_forward(block: Any, hidden_states: Tensor) -> Tensor:
    """ResBlock."""
    h = convolve(block.conv2, block.nonlinearity(convolve(block.conv1, hidden_states)))
    h = block.norm(h.movedim(1, -1)).movedim(-1, 1) if block.norm_type == "rms_norm" else block.norm(h)
    fresh = is_plain(block.norm, nn.BatchNorm2d) or not _changed(block.norm)
    return add(h, hidden_states, overwrite=fresh)


def _dc_residual_obstacle(block: Any) -> str | None:
    return _conv_obstacle("conv1", block.conv1) or _conv_obstacle("conv2", block.conv2)


def _no_obstacle(_: nn.Module) -> None:
    return None


# class name -> what the report calls it, its forward, and why one may have to be left
_FORWARDS: dict[str, tuple[str, Callable[..., Tensor], Callable[[Any], str | None]]] = {
    "ResnetBlock2D": ("residual blocks", _resnet_forward, _resnet_obstacle),
    "DownEncoderBlock2D": ("levels", _level_forward, _no_obstacle),
    "UpDecoderBlock2D": ("levels", _level_forward, _no_obstacle),
    "Upsample2D": ("upsamplers", _upsample_forward, _upsample_obstacle),
    "UNetMidBlock2D": ("middle blocks", _middle_forward, _no_obstacle),
    "ResBlock": ("residual blocks", _dc_residual_forward, _dc_residual_obstacle),
}
# where AutoencoderDC has an RMSNorm: class of its parent, and its name; other models have others
_RMS_NORMS = {
    ("ResBlock", "norm"),
    ("GLUMBConv", "norm"),
    ("SanaMultiscaleLinearAttention", "norm_out"),
    ("Decoder", "norm_out"),
}

"""Select the part of an autoencoder that is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from torch import nn

from latentae.errors import ModelError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.base import Autoencoder
from latentae.models.blocks import Attention, ResnetBlock
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.dc.blocks import AttentionBlock, ResidualBlock

__all__ = ["Part", "select_trainable", "trunk_names"]

Part = Literal["all", "decoder", "decoder-head", "encoder", "latent"]


def select_trainable(model: Autoencoder, part: Part) -> None:
    """Set `requires_grad` so that only a part of the model is trained.

    A reconstruction gives every parameter of it a gradient.

    Args:
        model: its parameters' `requires_grad` is set.
        part: "all"; "decoder" (with the 1x1 convolution before it) or "decoder-head" (its finest
            level and the layers after it), which leave the latent unchanged; "encoder" (with the
            1x1 convolution after it); or "latent", the coarsest level and the middle of both, which
            DC-AE adapts to a higher resolution (Chen et al. 2024, "decoupled high-resolution
            adaptation"). In an AutoencoderDC only levels with blocks count.

    Raises:
        ModelError: an unknown part, or one that this architecture does not have.
    """
    if part not in get_args(Part):
        raise ModelError(f"unknown part {part!r} to train; the parts are {', '.join(get_args(Part))}")
    if isinstance(model, AutoencoderKL):
        modules = _kl_modules(model, part)
    elif isinstance(model, AutoencoderDC):
        modules = _dc_modules(model, part)
    elif part == "all":
        modules = [model]
    else:
        raise ModelError(f"a {type(model).__name__} has no part {part!r}; train 'all'")
    model.requires_grad_(False)
    for module in modules:
        if module is not None:
            module.requires_grad_(True)


def _kl_modules(model: AutoencoderKL, part: Part) -> Iterable[nn.Module | None]:
    encoder, decoder = model.encoder, model.decoder
    before = (encoder.down_blocks[-1], encoder.mid_block, encoder.conv_norm_out, encoder.conv_out)
    after = (decoder.conv_in, decoder.mid_block, decoder.up_blocks[0])
    return {
        "all": [model],
        "encoder": [encoder, model.quant_conv],
        "decoder": [model.post_quant_conv, decoder],
        "decoder-head": [decoder.up_blocks[-1], decoder.conv_norm_out, decoder.conv_out],
        "latent": [*before, model.quant_conv, model.post_quant_conv, *after],
    }[part]


def _dc_modules(model: AutoencoderDC, part: Part) -> Iterable[nn.Module | None]:
    encoder, decoder = model.encoder, model.decoder
    down = [level for level in encoder.down_blocks if len(level)]  # pyright: ignore[reportArgumentType]
    up = [level for level in decoder.up_blocks if len(level)]  # pyright: ignore[reportArgumentType]
    return {
        "all": [model],
        "encoder": [encoder],
        "decoder": [decoder],
        "decoder-head": [*up[:1], decoder.norm_out, decoder.conv_out],
        "latent": [*down[-1:], encoder.conv_out, encoder.conv_out_logvar, decoder.conv_in, *up[-1:]],
    }[part]


def trunk_names(model: Autoencoder) -> set[str]:
    """Names of the parameters outside residual branches."""
    branches = (ResnetBlock, Attention, ResidualBlock, AttentionBlock)
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, branches))
    return {name for name, _ in model.named_parameters() if not name.startswith(prefixes)}

"""Which part of an autoencoder learns. The forward pass builds no graph in front of the first layer that does."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Let `part` of the model learn and nothing else; every parameter of it gets a gradient from a reconstruction.

    Args:
        model: its parameters' `requires_grad` is set.
        part: "all"; "decoder" (with the 1x1 convolution before it) or "decoder-head" (its finest level and what comes after), which
            leave the latent as it is; "encoder" (with the 1x1 convolution after it); or "latent", the coarsest level and the middle of
            both: what DC-AE adapts to a higher resolution (Chen et al. 2024, "decoupled high-resolution adaptation"). Of an
            AutoencoderDC levels are those that have blocks.

    Raises:
        ModelError: an unknown part, or one that this architecture does not have.
    """
    if part not in get_args(Part):
        raise ModelError(f"unknown part {part!r} to train; the parts are {', '.join(get_args(Part))}")
    if not isinstance(model, AutoencoderKL | AutoencoderDC):
        if part != "all":
            raise ModelError(
                f"a {type(model).__name__} is trained as a whole, not by parts such as {part!r}; take 'all'"
            )
        model.requires_grad_(True)
        return
    model.requires_grad_(False)
    for module in _modules(model, part) if isinstance(model, AutoencoderKL) else _dc_modules(model, part):
        if module is not None:
            module.requires_grad_(True)


def _modules(model: AutoencoderKL, part: Part) -> Iterator[nn.Module | None]:
    encoder, decoder = model.encoder, model.decoder
    if part in ("all", "encoder"):
        yield from (encoder, model.quant_conv)
    if part in ("all", "decoder"):
        yield from (model.post_quant_conv, decoder)
    if part == "decoder-head":
        yield from (decoder.up_blocks[-1], decoder.conv_norm_out, decoder.conv_out)
    if part == "latent":
        yield from (
            encoder.down_blocks[-1],
            encoder.mid_block,
            encoder.conv_norm_out,
            encoder.conv_out,
            model.quant_conv,
        )
        yield from (model.post_quant_conv, decoder.conv_in, decoder.mid_block, decoder.up_blocks[0])


def _dc_modules(model: AutoencoderDC, part: Part) -> Iterator[nn.Module | None]:
    encoder, decoder = model.encoder, model.decoder
    levels = (encoder.down_blocks, decoder.up_blocks)
    down, up = ([level for level in blocks if len(level)] for blocks in levels)  # pyright: ignore
    if part in ("all", "encoder"):
        yield encoder
    if part in ("all", "decoder"):
        yield decoder
    if part == "decoder-head":
        yield from (*up[:1], decoder.norm_out, decoder.conv_out)
    if part == "latent":
        yield from (*down[-1:], encoder.conv_out, encoder.conv_out_logvar, decoder.conv_in, *up[-1:])


def trunk_names(model: Autoencoder) -> set[str]:
    """Names of the parameters that are in no residual branch: what an image passes through if all branches add nothing."""
    branches = [
        name
        for name, m in model.named_modules()
        if isinstance(m, ResnetBlock | Attention | ResidualBlock | AttentionBlock)
    ]
    return {
        name
        for name, _ in model.named_parameters()
        if not any(name.startswith(f"{branch}.") for branch in branches)
    }

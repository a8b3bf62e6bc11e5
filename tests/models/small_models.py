"""Autoencoders small enough for the kernels' interpreter, and helpers of several tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from latentae.models.base import Autoencoder
from latentae.models.blocks import Attention
from latentae.models.config import AutoencoderDCConfig, AutoencoderKLConfig
from latentae.models.presets import PRESETS, preset
from latentae.models.tiling.steps import Residual, Step, scale_change

LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
DC = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16, 32),
    "decoder_block_out_channels": (8, 16, 32),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
}
"""Values of an AutoencoderDC of f = 4 with both types of blocks."""

DC_TWO_LEVELS = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16),
    "decoder_block_out_channels": (8, 16),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 2),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
}
"""The smallest AutoencoderDC with both types of blocks, f = 2."""


def narrow(name: str, **overrides) -> AutoencoderKLConfig:
    """A preset with its depth and attention kept and its width scaled down to 8 channels a unit."""
    widths = PRESETS[name]["block_out_channels"]
    return preset(
        name, block_out_channels=tuple(8 * w // widths[0] for w in widths), norm_num_groups=4, **overrides
    )


def two_levels(name: str = "kl-f8", **overrides) -> AutoencoderKLConfig:
    """An f2 model with every type of layer."""
    return preset(
        name,
        **{"block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1, **LEVELS, **overrides},
    )


def dc_config(**changes) -> AutoencoderDCConfig:
    return AutoencoderDCConfig(**{**DC, **changes})


def images_of(model: Autoencoder, side: int = 2) -> torch.Tensor:
    """Two images whose latents are `side` x `side`."""
    return torch.rand(2, 3, side * model.config.downsampling, side * model.config.downsampling) * 2 - 1


def randomize_norms(model: nn.Module, spread: float = 0.3) -> nn.Module:
    """Draw the affine parts of group normalizations: their defaults would hide a mix-up."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1.0, spread)
            nn.init.normal_(module.bias, 0.0, spread)
    return model


def equal(a: nn.Module | dict[str, torch.Tensor], b: nn.Module | dict[str, torch.Tensor]) -> bool:
    """Whether two models, or state dicts, have the same keys and values."""
    one, other = (dict(x.state_dict()) if isinstance(x, nn.Module) else x for x in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def kept_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that the graph of a forward pass keeps, without the parameters."""
    own, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def remember(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        output = forward()
    kept = sum(t.untyped_storage().nbytes() for address, t in storages.items() if address not in own)
    del output
    return kept


def weights_that_do_not_learn(model: Autoencoder, x: torch.Tensor) -> list[str]:
    """Names of parameters without a gradient in the second step, after branches left zero."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x).reconstruction - x).square().mean().backward()
        optimizer.step()
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def halo(steps: list[Step], scale: float) -> int:
    """Reach of a result in image pixels; `scale` is image pixels per pixel of the first input."""
    reach = 0.0
    for step in steps:
        assert not isinstance(step, Attention)
        if isinstance(step, Residual):
            reach += scale * (step.first.conv.padding[0] + step.second.conv.padding[0])
            continue
        after = scale / scale_change(step)
        # a doubled pixel is as far as half of one before; a halving convolution reaches two pixels
        # down and right
        reach += scale * 2 if step.kind == "down" else after * int(step.conv.padding[0])
        scale = after
    return int(-(-reach // 1))

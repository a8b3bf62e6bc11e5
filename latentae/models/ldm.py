"""LDM's names of weights: single files of a latent diffusion model or of its autoencoder.

encoder.down.0.block.1.nin_shortcut     encoder.down_blocks.0.resnets.1.conv_shortcut
encoder.down.0.attn.1.q                 encoder.down_blocks.0.attentions.1.to_q
encoder.down.0.downsample               encoder.down_blocks.0.downsamplers.0
encoder.mid.block_1, attn_1, block_2    encoder.mid_block.resnets.0, attentions.0, resnets.1
decoder.up.3                            decoder.up_blocks.0
encoder.norm_out                        encoder.conv_norm_out

LDM's attention layers are 1x1 convolutions, diffusers' are linear. LDM counts the decoder's levels
from fine to coarse. Source: Rombach et al. 2022, ldm/modules/diffusionmodules/model.py in their
repository.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from latentae.errors import ModelError, some
from latentae.models.config import DOWN, UP, AutoencoderKLConfig, check_values
from latentae.progress import note

__all__ = ["discriminator_from_ldm", "infer_config", "ldm_names", "ldm_prefix", "prefix_before", "to_ldm"]

_MARK = "encoder.mid.block_1.conv1.weight"
# prefixes that are preferred: none, of a latent diffusion model, of a bundle of components
_PREFIXES = ("", "first_stage_model.", "vae.")
_DISCRIMINATOR = "loss.discriminator."
_RUNNING = ("running_mean", "running_var", "num_batches_tracked")
_SCALE = "scale_factor"
_GROUPS = 32  # fixed in LDM's Normalize

_RENAMED = (
    (r"^(encoder|decoder)\.mid_block\.resnets\.0\.", r"\1.mid.block_1."),
    (r"^(encoder|decoder)\.mid_block\.resnets\.1\.", r"\1.mid.block_2."),
    (r"^(encoder|decoder)\.mid_block\.attentions\.0\.", r"\1.mid.attn_1."),
    (r"^encoder\.down_blocks\.", "encoder.down."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)


def ldm_names(keys: Iterable[str], levels: int) -> dict[str, str]:
    """State-dict key -> LDM's name, for a model of `levels` resolutions."""
    return {key: _ldm_name(key, levels) for key in keys}


def _ldm_name(key: str, levels: int) -> str:
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    return re.sub(r"^decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", key)


def to_ldm(state: Mapping[str, Tensor], config: AutoencoderKLConfig) -> dict[str, Tensor]:
    """A state dict of this library under LDM's names, without prefix.

    LDM's own code reads it if `norm_num_groups` is 32, both 1x1 convolutions and the middle
    attention are present, and attention follows all blocks of a level or none; other readers may
    take more.
    """
    names = ldm_names(state, len(config.block_out_channels))
    return {
        names[key]: value[:, :, None, None] if ".attentions." in key and value.ndim == 2 else value
        for key, value in state.items()
    }


def prefix_before(keys: Iterable[str], mark: str) -> str | None:
    """The prefix of an autoencoder's keys in a file, found by one key; None without that key.

    Raises:
        ModelError: the file holds several autoencoders.
    """
    found = sorted({key.removesuffix(mark) for key in keys if key == mark or key.endswith(f".{mark}")})
    known = [prefix for prefix in _PREFIXES if prefix in found]
    if not known and len(found) > 1:
        raise ModelError(
            f"it holds several autoencoders, under {some(found)}; save the one that you want in its own file"
        )
    return (known or found or [None])[0]


def ldm_prefix(keys: Iterable[str]) -> str | None:
    """The prefix of the autoencoder's keys in an LDM file; None if it is no LDM file."""
    return prefix_before(keys, _MARK)


def infer_config(tensors: Mapping[str, Tensor]) -> AutoencoderKLConfig:
    """The config of the autoencoder in an LDM file, from the names and shapes of its tensors.

    The number of groups is LDM's 32 and the image size is the config's default. The scaling factor
    is that of the latent diffusion model in the file (`scale_factor`), or the default.

    Raises:
        ModelError: no LDM autoencoder, or not a KL autoencoder of this family.
    """
    prefix = ldm_prefix(tensors)
    if prefix is None:
        raise ModelError(f"no LDM autoencoder: it has no {_MARK}, with or without a prefix")
    found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    levels = range(_count(found, "encoder.down.{}.block.0.conv1.weight"))
    image, moments = _convolution(found, "encoder.conv_in"), _convolution(found, "encoder.conv_out")
    latent, output = _convolution(found, "decoder.conv_in"), _convolution(found, "decoder.conv_out")
    if moments[0] != 2 * latent[1]:
        raise ModelError(
            f"its encoder gives {moments[0]} channels and its decoder takes {latent[1]}, expected half as "
            "many (mean and log-variance); other families such as VQ are not read"
        )
    widths = [_convolution(found, f"encoder.down.{level}.block.0.conv1")[0] for level in levels]
    values: dict[str, Any] = {
        "in_channels": image[1],
        "out_channels": output[0],
        "latent_channels": latent[1],
        "block_out_channels": widths,
        "down_block_types": [DOWN[f"encoder.down.{level}.attn.0.q.weight" in found] for level in levels],
        "up_block_types": [UP[f"decoder.up.{level}.attn.0.q.weight" in found] for level in reversed(levels)],
        "layers_per_block": _count(found, "encoder.down.0.block.{}.conv1.weight"),
        "norm_num_groups": _GROUPS,
        "use_quant_conv": "quant_conv.weight" in found,
        "use_post_quant_conv": "post_quant_conv.weight" in found,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in found,
    }
    scale = tensors.get(_SCALE)
    if scale is not None and scale.numel() == 1 and scale.is_floating_point():
        values["scaling_factor"] = float(scale)
    return check_values(
        AutoencoderKLConfig, values, "its tensors have no known shape, put its config.json next to it"
    )


def _count(found: Mapping[str, Tensor], pattern: str) -> int:
    count = 0
    while pattern.format(count) in found:
        count += 1
    if not count:
        raise ModelError(f"it has no {pattern.format(0)}, which a model of its shape needs")
    return count


def _convolution(found: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    value = found.get(f"{name}.weight")
    if value is None or value.ndim != 4:
        what = "is missing" if value is None else f"has shape {tuple(value.shape)}"
        raise ModelError(f"{name}.weight {what}; an autoencoder of images has [C_out, C_in, k, k]")
    return tuple(value.shape)


def discriminator_from_ldm(
    tensors: Mapping[str, Tensor], file: str | Path = "the LDM file"
) -> dict[str, Tensor] | None:
    """The PatchGAN of an LDM autoencoder's training, under PatchDiscriminator's keys.

    It keeps convolutions and the scale and shift of normalizations. It drops the running statistics
    of LDM's BatchNorm, and logs that: a PatchDiscriminator normalizes each image by itself, so it
    starts as a related network, not as the same one.

    Args:
        tensors: content of the file.
        file: its name in the log.
    """
    start = (ldm_prefix(tensors) or "") + _DISCRIMINATOR
    state = {
        re.sub(r"^main\.", "layers.", key.removeprefix(start)): value
        for key, value in tensors.items()
        if key.startswith(start)
    }
    running = [key for key in state if key.endswith(_RUNNING)]
    if running:
        note(
            f"{file}: left out the running statistics of the discriminator's BatchNorm ({len(running)} "
            "tensors)"
        )
    return {key: value for key, value in state.items() if key not in running} or None

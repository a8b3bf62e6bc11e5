"""The names that latent diffusion (CompVis) gives the same weights: single-file checkpoints, of a model or of its autoencoder alone.

encoder.down.0.block.1.nin_shortcut     encoder.down_blocks.0.resnets.1.conv_shortcut
encoder.down.0.attn.1.q                 encoder.down_blocks.0.attentions.1.to_q            a 1x1 convolution / a linear layer
encoder.down.0.downsample               encoder.down_blocks.0.downsamplers.0
encoder.mid.block_1, attn_1, block_2    encoder.mid_block.resnets.0, attentions.0, resnets.1
decoder.up.3                            decoder.up_blocks.0                                LDM counts from fine to coarse
encoder.norm_out                        encoder.conv_norm_out

Source of the names: Rombach et al. 2022, the repository's ldm/modules/diffusionmodules/model.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.errors import ModelError, some
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import DOWN, UP, AutoencoderKLConfig, check_values
from latentae.models.weight_files import note_left_out, prefix_before, split_unknown
from latentae.progress import note

__all__ = [
    "discriminator_from_ldm",
    "from_ldm",
    "infer_config",
    "ldm_names",
    "ldm_prefix",
    "renamed_to_ldm",
    "to_ldm",
]

_MARK = "encoder.mid.block_1.conv1.weight"
_DISCRIMINATOR = "loss.discriminator."
_RUNNING = ("running_mean", "running_var", "num_batches_tracked")
_SCALE = "scale_factor"
_GROUPS = 32  # LDM's Normalize knows no other

# Tensors that tell another family with LDM's names, and what to do with it.
_FAMILIES = (
    (
        re.compile(r"^(bn\.|encoder\.quant_conv\.|decoder\.post_quant_conv\.)"),
        "this is FLUX.2's layout, which is not read; `evaluate` reads its diffusers folder (AutoencoderKLFlux2)",
    ),
    (
        re.compile(r"(^|\.)(time_stack|mix_factor|time_mix_conv)\b"),
        "these are layers over time, of an autoencoder of videos; give one of images",
    ),
)

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


def ldm_names(config: AutoencoderKLConfig) -> dict[str, str]:
    """Every state-dict key of a model -> LDM's name of it."""
    return {key: _ldm_name(key, len(config.block_out_channels)) for key in _shapes(config)}


def _ldm_name(key: str, levels: int) -> str:
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    return re.sub(
        r"^decoder\.up_blocks\.(\d+)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", key
    )


def renamed_to_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under diffusers' names of today, put under LDM's, of which `infer_config` reads the shape; values stay as they are."""
    levels = 0
    while f"decoder.up_blocks.{levels}.resnets.0.conv1.weight" in tensors:
        levels += 1
    return {_ldm_name(key, levels): value for key, value in tensors.items()}


def _shapes(config: AutoencoderKLConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in AutoencoderKL(config).state_dict().items()}


def to_ldm(state: Mapping[str, Tensor], config: AutoencoderKLConfig) -> dict[str, Tensor]:
    """A state dict of ours under LDM's names, without prefix; attention layers become 1x1 convolutions again.

    LDM's own code reads it where `norm_num_groups` is 32, both 1x1 convolutions and the middle attention are there, and
    attention follows all blocks of a level or none; other readers may take more.
    """
    names = ldm_names(config)
    return {
        names[key]: value[:, :, None, None] if _is_attention_matrix(key) else value
        for key, value in state.items()
    }


def _is_attention_matrix(key: str) -> bool:
    return ".attentions." in key and key.endswith(".weight") and ".group_norm." not in key


def ldm_prefix(keys: Iterable[str]) -> str | None:
    """What stands before the autoencoder's keys in an LDM file, or None if these are not the keys of one."""
    return prefix_before(keys, _MARK)


def from_ldm(
    tensors: Mapping[str, Tensor], config: AutoencoderKLConfig, file: str | Path = "the LDM file"
) -> dict[str, Tensor]:
    """The state dict, under our names, of the autoencoder in an LDM file.

    Where the file holds an average of all the autoencoder's weights (`model_ema.*`, as LDM's `ema_decay` writes), the average is taken,
    as everywhere here; the average of a latent diffusion model is of its denoiser only, and is not looked at.

    Args:
        tensors: the file's content, with or without a prefix such as "first_stage_model." or "vae.".
        config: the autoencoder's shape, for instance what `infer_config` reads from the same tensors.
        file: what the log calls the file. It names the tensors that are left out: those of the training and of other components.

    Raises:
        ModelError: no LDM autoencoder, a key or shape that does not fit, or a tensor that a model of this shape does not have.
    """
    prefix, found = _autoencoder_part(tensors)
    names, shapes = ldm_names(config), _shapes(config)
    averaged = {
        key: "model_ema." + name.replace(".", "") for key, name in names.items()
    }  # LDM's LitEma leaves out the dots
    whole_average = not prefix and all(name in found for name in averaged.values())
    state = {
        key: _fitting(found, name, key, shapes[key])
        for key, name in (averaged if whole_average else names).items()
    }
    used = {prefix + name for name in names.values()} | (set(averaged.values()) if whole_average else set())
    unknown, harmless = split_unknown(tensors, used, prefix)
    if unknown:
        families = (
            text for pattern, text in _FAMILIES for key in unknown if pattern.search(key.removeprefix(prefix))
        )
        advice = next(families, "give weights of an AutoencoderKL, or the config.json that belongs to these")
        raise ModelError(
            f"the LDM file has {some(unknown)}, which an AutoencoderKL of its shape does not have: {advice}"
        )
    if whole_average:
        note(f"{file}: took the averaged weights (model_ema.*)")
    note_left_out(file, harmless)
    return state


def _autoencoder_part(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    prefix = ldm_prefix(tensors)
    if prefix is None:
        raise ModelError(
            f"no LDM autoencoder: there is no {_MARK}, alone or behind a prefix such as first_stage_model."
        )
    return prefix, {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def _fitting(found: Mapping[str, Tensor], name: str, key: str, shape: tuple[int, ...]) -> Tensor:
    if name not in found:
        raise ModelError(f"the LDM file has no {name}, which a model of its shape needs")
    value = found[name]
    if _is_attention_matrix(key) and value.ndim > 2 and set(value.shape[2:]) == {1}:
        value = value.flatten(1)
    if tuple(value.shape) != shape:
        raise ModelError(
            f"the LDM file's {name} has shape {tuple(value.shape)}, a model of its shape has {shape}"
        )
    return value


def infer_config(tensors: Mapping[str, Tensor]) -> AutoencoderKLConfig:
    """The config of the autoencoder in an LDM file, from the names and shapes of its tensors.

    They do not tell the number of groups, which is LDM's 32, nor the image size, which is the config's default. The scaling factor is
    that of the latent diffusion model where the file holds one (`scale_factor`), else the default.

    Raises:
        ModelError: no LDM autoencoder, or not a KL autoencoder of this family.
    """
    _, found = _autoencoder_part(tensors)
    levels = _count(found, "encoder.down.{}.block.0.conv1.weight")
    image, moments = _convolution(found, "encoder.conv_in"), _convolution(found, "encoder.conv_out")
    latent, output = _convolution(found, "decoder.conv_in"), _convolution(found, "decoder.conv_out")
    if moments[0] != 2 * latent[1]:
        raise ModelError(
            f"the LDM file's encoder gives {moments[0]} channels and its decoder takes {latent[1]}; a KL autoencoder gives twice "
            "what it takes (mean and log-variance), other kinds such as VQ are not read here"
        )
    values: dict[str, Any] = {
        "in_channels": image[1],
        "out_channels": output[0],
        "latent_channels": latent[1],
        "block_out_channels": tuple(
            _convolution(found, f"encoder.down.{level}.block.0.conv1")[0] for level in range(levels)
        ),
        "down_block_types": tuple(
            DOWN[f"encoder.down.{level}.attn.0.q.weight" in found] for level in range(levels)
        ),
        "up_block_types": tuple(
            UP[f"decoder.up.{level}.attn.0.q.weight" in found] for level in reversed(range(levels))
        ),
        "layers_per_block": _count(found, "encoder.down.0.block.{}.conv1.weight"),
        "norm_num_groups": _GROUPS,
        "use_quant_conv": "quant_conv.weight" in found,
        "use_post_quant_conv": "post_quant_conv.weight" in found,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in found,
    }
    scale = tensors.get(_SCALE)
    if scale is not None and scale.numel() == 1 and scale.is_floating_point():
        values["scaling_factor"] = float(scale)
    return check_values(AutoencoderKLConfig, values, "the LDM file, whose config.json is missing,")


def _count(found: Mapping[str, Tensor], pattern: str) -> int:
    count = 0
    while pattern.format(count) in found:
        count += 1
    if not count:
        raise ModelError(f"the LDM file has no {pattern.format(0)}, which a model of its shape needs")
    return count


def _convolution(found: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    value = found.get(f"{name}.weight")
    if value is None or value.ndim != 4:
        what = "is not there" if value is None else f"has shape {tuple(value.shape)}"
        raise ModelError(
            f"the LDM file's {name}.weight {what}; an autoencoder of images has [C_out, C_in, k, k]"
        )
    return tuple(value.shape)


def discriminator_from_ldm(
    tensors: Mapping[str, Tensor], file: str | Path = "the LDM file"
) -> dict[str, Tensor] | None:
    """The PatchGAN that an LDM autoencoder was trained against, under PatchDiscriminator's keys; None where there is none.

    Convolutions and the normalizations' scale and shift are kept. The running statistics of LDM's BatchNorm are dropped, and the log says
    so: a PatchDiscriminator normalizes each image for itself, so it starts as a related network, not as the same one.

    Args:
        tensors: the file's content.
        file: what the log calls the file.
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
            f"{file}: left out the running statistics of the discriminator's BatchNorm ({len(running)} tensors)"
        )
    return {key: value for key, value in state.items() if key not in running} or None

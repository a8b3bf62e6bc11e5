"""The single file under LDM's names, and which programs load it.

The file has the same weights. Next to it is the config.json, which diffusers' `from_single_file` and latentae read; other programs read the
file alone, and build the model that they expect.

What ComfyUI (a125cd84, October 2025) and kohya's scripts load was found by running their loaders on files of many shapes. A1111 loads the
file into the autoencoder of the open checkpoint, strictly, so it takes the same shape as kohya.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from latentae.files import write_json
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import DOWN, UP, AutoencoderKLConfig
from latentae.models.ldm import to_ldm
from latentae.models.pretrained import CONFIG, LDM_WEIGHTS, save_weights

__all__ = ["LdmReader", "ldm_notes", "ldm_readers", "write_ldm"]

_GROUPS, _BLOCKS = 32, 2
_F4, _F8 = (128, 256, 512), (128, 256, 512, 512)
_OTHERS = (32, 64)  # latent channels by which ComfyUI recognizes other models


class LdmReader(NamedTuple):
    """A program that reads such files, and what in a model it does not load right; nothing if it does."""

    program: str
    how: str
    problems: tuple[str, ...]


def write_ldm(model: AutoencoderKL, config: AutoencoderKLConfig, folder: Path) -> None:
    """Write `vae.ldm.safetensors` in fp32, without prefix, and `config.json`; reading it back gives the weights bit for bit."""
    save_weights(to_ldm(model.state_dict(), config), folder / LDM_WEIGHTS, torch.float32)
    write_json(folder / CONFIG, config.diffusers_dict())


def ldm_readers(config: AutoencoderKLConfig) -> tuple[LdmReader, ...]:
    """Which programs load the file of a model of this shape."""
    widths, z = config.block_out_channels, config.latent_channels
    convolutions = (
        f"{config.use_quant_conv + config.use_post_quant_conv} of the two 1x1 convolutions at the latent"
    )
    attention = DOWN[1] in config.down_block_types or UP[1] in config.up_block_types
    common = {
        f"layers_per_block {config.layers_per_block}, not {_BLOCKS}": config.layers_per_block != _BLOCKS,
        f"norm_num_groups {config.norm_num_groups}, not {_GROUPS}": config.norm_num_groups != _GROUPS,
        f"{config.in_channels} image channels in and {config.out_channels} out, not 3": {
            config.in_channels,
            config.out_channels,
        }
        != {3},
        "no attention in the middle": not config.mid_block_add_attention,
    }
    comfyui = {
        f"block_out_channels {list(widths)}, not {list(_F8)} or {list(_F4)}": widths not in (_F8, _F4),
        f"{z} latent channels, by which ComfyUI takes the file for another model's": z in _OTHERS,
        f"{convolutions}, not both or neither": config.use_quant_conv != config.use_post_quant_conv,
        **common,
        "attention in a level, which ComfyUI leaves out without an error": attention,
    }
    stable_diffusion = {
        f"block_out_channels {list(widths)}, not {list(_F8)}": widths != _F8,
        f"{z} latent channels, not 4": z != 4,
        f"{convolutions}, not both": not (config.use_quant_conv and config.use_post_quant_conv),
        **common,
        "attention in a level": attention,
    }
    return (
        LdmReader(
            "ComfyUI", "from its folder models/vae", tuple(text for text, found in comfyui.items() if found)
        ),
        LdmReader(
            "A1111 and kohya's scripts",
            "as the VAE of Stable Diffusion",
            tuple(text for text, found in stable_diffusion.items() if found),
        ),
    )


def ldm_notes(config: AutoencoderKLConfig) -> tuple[str, ...]:
    """Which programs load such a file right, a sentence each."""
    notes = []
    for program, how, problems in ldm_readers(config):
        if problems:
            notes.append(
                f"This file does not work in {program} (an error or wrong images): the model has {'; '.join(problems)}."
            )
        else:
            notes.append(f"This file works in {program}, {how}.")
    if config.latent_channels == 16 and (config.use_quant_conv or config.use_post_quant_conv):
        notes.append(
            "stable-diffusion.cpp leaves out the 1x1 convolutions at the latent of models with 16 channels, and with them a folded "
            "normalization: its images are wrong."
        )
    notes.append(
        "None of these programs reads the scaling in config.json: they use the constants of the diffusion model."
    )
    return tuple(notes)

"""The single weights file with LDM's key names, and which programs load it.

The file has the same weights as the diffusers folder. diffusers' `from_single_file` and latentae
also read the config.json next to it; other programs read the file alone and build the model they
expect.

What ComfyUI (a125cd84, October 2025) and kohya's scripts load was found by running their loaders on
files of many shapes. A1111 loads the file into the autoencoder of the open checkpoint, strictly, so
it needs the same shape as kohya's scripts.
"""

from __future__ import annotations

from pathlib import Path

import torch

from latentae.files import write_json
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import DOWN, UP, AutoencoderKLConfig
from latentae.models.ldm import to_ldm
from latentae.models.pretrained import CONFIG, LDM_WEIGHTS, save_weights

__all__ = ["ldm_notes", "ldm_problems", "write_ldm"]

COMFYUI, KOHYA = "ComfyUI", "A1111 and kohya's scripts"
USES = {COMFYUI: "from its folder models/vae", KOHYA: "as the VAE of Stable Diffusion"}
_GROUPS, _BLOCKS = 32, 2
_F4, _F8 = (128, 256, 512), (128, 256, 512, 512)
_OTHERS = (32, 64)  # latent channels by which ComfyUI recognizes other models


def write_ldm(model: AutoencoderKL, config: AutoencoderKLConfig, folder: Path) -> None:
    """Write `vae.ldm.safetensors` in fp32, with keys without prefix, and `config.json`."""
    save_weights(to_ldm(model.state_dict(), config), folder / LDM_WEIGHTS, torch.float32)
    write_json(folder / CONFIG, config.diffusers_dict())


def ldm_problems(config: AutoencoderKLConfig) -> dict[str, tuple[str, ...]]:
    """Per program, the properties of the model that it does not load correctly."""
    widths, z = config.block_out_channels, config.latent_channels
    channels = {config.in_channels, config.out_channels}
    count = config.use_quant_conv + config.use_post_quant_conv
    convolutions = f"{count} of the two 1x1 convolutions at the latent"
    attention = DOWN[1] in config.down_block_types or UP[1] in config.up_block_types
    common = {
        f"layers_per_block {config.layers_per_block}, not {_BLOCKS}": config.layers_per_block != _BLOCKS,
        f"norm_num_groups {config.norm_num_groups}, not {_GROUPS}": config.norm_num_groups != _GROUPS,
        f"{config.in_channels} image channels in and {config.out_channels} out, not 3": channels != {3},
        "no attention in the middle": not config.mid_block_add_attention,
    }
    comfyui = {
        f"block_out_channels {list(widths)}, not {list(_F8)} or {list(_F4)}": widths not in (_F8, _F4),
        f"{z} latent channels, by which ComfyUI takes the file for another model's": z in _OTHERS,
        f"{convolutions}, not both or neither": count == 1,
        **common,
        "attention in a level, which ComfyUI leaves out without an error": attention,
    }
    kohya = {
        f"block_out_channels {list(widths)}, not {list(_F8)}": widths != _F8,
        f"{z} latent channels, not 4": z != 4,
        f"{convolutions}, not both": count != 2,
        **common,
        "attention in a level": attention,
    }
    return {
        program: tuple(text for text, found in checks.items() if found)
        for program, checks in ((COMFYUI, comfyui), (KOHYA, kohya))
    }


def ldm_notes(config: AutoencoderKLConfig) -> tuple[str, ...]:
    """One sentence per program: whether it loads the file of such a model correctly."""
    notes = []
    for program, problems in ldm_problems(config).items():
        if problems:
            notes.append(
                f"This file does not work in {program} (an error or wrong images): "
                f"the model has {'; '.join(problems)}."
            )
        else:
            notes.append(f"This file works in {program}, {USES[program]}.")
    if config.latent_channels == 16 and (config.use_quant_conv or config.use_post_quant_conv):
        notes.append(
            "stable-diffusion.cpp leaves out the 1x1 convolutions at the latent of models with 16 channels, "
            "and with them a folded normalization: its images are wrong."
        )
    notes.append(
        "None of these programs reads the scaling in config.json: "
        "they use the constants of the diffusion model."
    )
    return tuple(notes)

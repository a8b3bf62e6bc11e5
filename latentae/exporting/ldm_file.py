"""The single file that ComfyUI, A1111 and kohya read: the same weights under LDM's names.

Beside it lies the config.json, which those do not need and diffusers' `from_single_file` does.
"""

from __future__ import annotations

from pathlib import Path

import torch

from latentae.files import write_json
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig
from latentae.models.ldm import to_ldm
from latentae.models.pretrained import CONFIG, LDM_WEIGHTS, save_weights

__all__ = ["ldm_notes", "write_ldm"]

LDM_GROUPS, COMFYUI_FACTOR, HUNYUAN_CHANNELS = 32, 8, 64


def write_ldm(model: AutoencoderKL, config: AutoencoderKLConfig, folder: Path) -> None:
    """Write `vae.ldm.safetensors` in fp32, without prefix, and `config.json`; reading it back gives the weights bit for bit."""
    save_weights(to_ldm(model.state_dict(), config), folder / LDM_WEIGHTS, torch.float32)
    write_json(folder / CONFIG, config.diffusers_dict())


def ldm_notes(config: AutoencoderKLConfig) -> tuple[str, ...]:
    """What other programs are known not to take in such a file, a sentence each."""
    notes = []
    if config.downsampling != COMFYUI_FACTOR:
        notes.append(
            f"ComfyUI's own VAE loader knows f{COMFYUI_FACTOR} (four levels) only; this model has f{config.downsampling}."
        )
    if config.latent_channels == HUNYUAN_CHANNELS:
        notes.append(f"ComfyUI takes {HUNYUAN_CHANNELS} latent channels for those of Hunyuan's model.")
    if config.norm_num_groups != LDM_GROUPS:
        notes.append(
            f"LDM's code norms in {LDM_GROUPS} groups, this model in {config.norm_num_groups}: only readers of config.json fit."
        )
    if (config.in_channels, config.out_channels) != (3, 3):
        notes.append(f"LDM's readers expect RGB; this model has {config.in_channels} channels in and {config.out_channels} out.")
    return tuple(notes)

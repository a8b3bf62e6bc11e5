"""Folders and files that other libraries load: diffusers, LDM, and parts for further training.

Our state-dict keys are diffusers' own, so weights are copied. The config has exactly the keys of
diffusers' class: an extra key would cause a warning at every load.

The LDM file has the same weights. diffusers' `from_single_file` and latentae also read the
config.json next to it; other programs read the file alone and build the model they expect. What
ComfyUI (a125cd84, October 2025) and kohya's scripts load was found by running their loaders on
files of many shapes. A1111 loads the file into the autoencoder of the open checkpoint, strictly, so
it needs the same shape as kohya's scripts.

Parts for further training are the discriminator, learned parts of the losses, and loss options.
Frozen networks (LPIPS, VGG, feature backbones) are in no checkpoint and in no export.
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.errors import ModelError
from latentae.file_names import DISCRIMINATOR, RECIPE
from latentae.files import read_json, write_json
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import DOWN, UP, AutoencoderDCConfig, AutoencoderKLConfig
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.ldm import to_ldm
from latentae.models.pretrained import CONFIG, LDM_WEIGHTS, META, TRAINING, WEIGHTS, ModelSource, save_weights
from latentae.models.weight_files import read_tensors

__all__ = [
    "Exportable",
    "ExportableConfig",
    "check_finite",
    "component_config",
    "copy_training_parts",
    "ldm_notes",
    "ldm_problems",
    "write_diffusers",
    "write_ldm",
]

Exportable = AutoencoderKL | AutoencoderDC
ExportableConfig = AutoencoderKLConfig | AutoencoderDCConfig

VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
TILE = 256  # diffusers takes sample_size for its tile side: small tiles are slow and show seams
COMFYUI, KOHYA = "ComfyUI", "A1111 and kohya's scripts"
USES = {COMFYUI: "from its folder models/vae", KOHYA: "as the VAE of Stable Diffusion"}
_GROUPS, _BLOCKS = 32, 2
_F4, _F8 = (128, 256, 512), (128, 256, 512, 512)
_OTHERS = (32, 64)  # latent channels by which ComfyUI recognizes other models
PARTS = {
    DISCRIMINATOR: "the network trained against",
    "objective.safetensors": "what the losses learned",
    "lecam.safetensors": "LeCAM's running means of the logits",
}
NOTE = "training.json"
_PATHS = ("weights", "backbone_weights")  # of perceptual networks: files of the training machine


def component_config(
    config: ExportableConfig,
    *,
    resolution: int,
    scaling_factor: float,
    shift_factor: float,
    force_upcast: bool = True,
) -> ExportableConfig:
    """The config that pipelines read: the model's own with the latent scaling and the tile side.

    `sample_size` is the training resolution, at least TILE, rounded up to a multiple of f.
    `force_upcast` is false only if fp16 was measured to be safe. diffusers' AutoencoderDC has no
    shift, tile side or `force_upcast`.
    """
    if isinstance(config, AutoencoderDCConfig):
        values = {"scaling_factor": scaling_factor, "sample_size": resolution}
        return config.model_copy(update={**values, "bottleneck": "deterministic"})
    f = config.downsampling
    values = {
        "sample_size": -(-max(resolution, TILE) // f) * f,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "force_upcast": force_upcast,
    }
    return AutoencoderKLConfig(**{**config.model_dump(), **values})


def check_finite(state: Mapping[str, Tensor], variant: str | None = None) -> None:
    """Check that all weights are finite in fp32 and in the dtype of a variant.

    Raises:
        ModelError: names the first tensor that is not.
    """
    for dtype in filter(None, (torch.float32, VARIANTS.get(variant or ""))):
        for name, value in state.items():
            if not value.to(dtype).isfinite().all():
                raise ModelError(
                    f"{name} has values that are not finite in {dtype}; export a healthy checkpoint"
                )


def write_diffusers(
    model: Exportable, config: ExportableConfig, folder: Path, variant: str | None = None
) -> None:
    """Write `config.json`, the fp32 weights and, for a variant, the half-precision weights."""
    state = model.state_dict()
    save_weights(state, folder / WEIGHTS, torch.float32)
    if variant is not None:
        stem, suffix = WEIGHTS.rsplit(".", 1)
        save_weights(state, folder / f"{stem}.{variant}.{suffix}", VARIANTS[variant])
    write_json(folder / CONFIG, config.diffusers_dict())


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


def copy_training_parts(source: ModelSource, folder: Path) -> dict[str, str]:
    """Copy a checkpoint's parts to `folder`/training.

    Returns:
        File name -> description; empty if the model is not from a run, or has no parts.

    Raises:
        ModelError: a part is damaged.
    """
    if source.kind not in ("run", "checkpoint"):
        return {}
    checkpoint = source.weights_file.parent
    found = {name: words for name, words in PARTS.items() if (checkpoint / name).is_file()}
    if not found:
        return {}
    (folder / TRAINING).mkdir()
    for name in found:
        read_tensors(checkpoint / name)
        shutil.copyfile(checkpoint / name, folder / TRAINING / name)
    write_json(folder / TRAINING / NOTE, _note(checkpoint))
    return {**found, NOTE: "step, images seen and the losses' options"}


def _note(checkpoint: Path) -> dict[str, Any]:
    """Progress of the training and its loss options, without paths of its machine."""
    try:
        meta = read_json(checkpoint / META)
        recipe = tomllib.loads((checkpoint / RECIPE).read_text(encoding="utf-8"))
        phases = [
            {"images": phase.get("images"), "loss": phase.get("loss", {})}
            for phase in recipe.get("phases", ())
        ]
        values = {name: meta[name] for name in ("latentae", "step", "images_seen")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{checkpoint} is damaged ({error!r}); export another checkpoint") from error
    return _without_paths({**values, "loss": recipe.get("loss", {}), "phases": phases})


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items() if key not in _PATHS}
    return [_without_paths(item) for item in value] if isinstance(value, list) else value
